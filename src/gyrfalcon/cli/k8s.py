"""`gyrfalcon k8s`: Kubernetes manifests for a model, filled in from the same arithmetic as `gyrfalcon fit`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, cast

import typer
import yaml

from gyrfalcon.cli.planning import (
    ConcurrencyOption,
    ContextOption,
    DeviceOption,
    DtypeOption,
    ModelArgument,
    QuantizeOption,
    one_of,
    plan_model,
)
from gyrfalcon.deploy.bundle import KINDS, Kind, files, stream
from gyrfalcon.deploy.plan import Autoscale, DeployPlan, WeightsFrom, plan_deployment
from gyrfalcon.errors import SettingsError
from gyrfalcon.footprint import DEFAULT_CONCURRENCY
from gyrfalcon.presets import BUNDLED

_SIZE = "Size"
_PODS = "Pods"


def k8s(
    model: ModelArgument,
    kind: Annotated[str, typer.Option(metavar="|".join(KINDS), help="What to write.")] = "plain",
    output: Annotated[
        Path | None, typer.Option(help="Folder to write to; standard output if absent.", show_default=False)
    ] = None,
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    context: ContextOption = None,
    concurrency: ConcurrencyOption = DEFAULT_CONCURRENCY,
    device: DeviceOption = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="download|image|claim",
            help="Where weights come from: an init container, the image, a claim. download if absent.",
            show_default=False,
        ),
    ] = None,
    claim: Annotated[
        str | None,
        typer.Option(help="PersistentVolumeClaim that holds a Hub cache with the weights.", show_default=False),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the objects; the model's if absent.", show_default=False)
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="Container image; gyrfalcon:cpu or gyrfalcon:cuda.", show_default=False)
    ] = None,
    port: Annotated[int, typer.Option(min=1024, max=65535, help="Port of the container.")] = 8080,
    replicas: Annotated[int, typer.Option(min=1, help="Pods.", rich_help_panel=_PODS)] = 1,
    max_replicas: Annotated[
        int | None,
        typer.Option(min=1, help="Most pods with --autoscale.", rich_help_panel=_PODS, show_default=False),
    ] = None,
    cpus: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processors of a pod; fits the model if absent.", rich_help_panel=_SIZE, show_default=False
        ),
    ] = None,
    drain: Annotated[
        int, typer.Option(min=0, max=3600, help="Seconds that requests have to finish.", rich_help_panel=_PODS)
    ] = 45,
    autoscale: Annotated[
        str, typer.Option(metavar="none|hpa|keda", help="More pods when requests wait.", rich_help_panel=_PODS)
    ] = "none",
    service_monitor: Annotated[
        bool, typer.Option("--service-monitor", help="Add a ServiceMonitor of the Prometheus operator.")
    ] = False,
    api_key_secret: Annotated[
        str | None, typer.Option(help="Secret whose API_KEY requests must carry.", show_default=False)
    ] = None,
    hub_token_secret: Annotated[
        str | None, typer.Option(help="Secret whose HF_TOKEN the download uses.", show_default=False)
    ] = None,
) -> None:
    """Write Kubernetes manifests for MODEL, with memory, processors and GPUs worked out.

    The default device is a GPU, and for the bundled model the CPU. kaito-workspace and kaito-inferenceset are for
    clusters that run KAITO.
    """
    checked_kind = cast(Kind, one_of("--kind", kind, *KINDS))
    if max_replicas is not None and max_replicas < replicas:
        raise SettingsError("--max-replicas", f"{max_replicas} is below --replicas {replicas}")
    planned = plan_model(
        model,
        dtype=dtype,
        quantize=quantize,
        device=device or ("cpu" if model == BUNDLED else None),
        context=context,
        concurrency=concurrency,
    )
    plan = plan_deployment(
        planned,
        weights=_choose_weights(model, one_of("--weights", weights, "download", "image", "claim"), claim),
        name=name,
        image=image,
        port=port,
        replicas=replicas,
        max_replicas=max_replicas,
        cpus=cpus,
        claim=claim,
        api_key_secret=api_key_secret,
        hub_token_secret=hub_token_secret,
        drain_s=drain,
        autoscale=cast(Autoscale, one_of("--autoscale", autoscale, "none", "hpa", "keda")),
        has_monitor=service_monitor,
    )
    texts = files(plan, checked_kind)
    if output is None:
        _print(plan, texts)
    else:
        _write(output, texts)


def _choose_weights(model: str, given: str | None, claim: str | None) -> WeightsFrom:
    if model == BUNDLED:
        return "package"
    if given is None:
        given = "download" if claim is None else "claim"
    if claim is not None and given != "claim":
        raise SettingsError("--claim", f"has no meaning with --weights {given}")
    if given == "download" and Path(model).is_dir():
        raise SettingsError(
            "--weights",
            f"`{model}` is a folder of this machine, which a pod cannot fetch: build an image that holds it and say "
            "--weights image, or give a Hub id",
        )
    return cast(WeightsFrom, given)


def _print(plan: DeployPlan, texts: dict[str, str]) -> None:
    if len(texts) == 1:
        sys.stdout.write(next(iter(texts.values())))
        return
    texts = {name: text for name, text in texts.items() if name != "kustomization.yaml"}
    sys.stdout.write(stream([yaml.safe_load(text) for text in texts.values()], f"{plan.planned.model}"))


def _write(folder: Path, texts: dict[str, str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise SettingsError("--output", f"`{folder}` cannot be written: {error.strerror or error}") from error
    for name in texts:
        print(folder / name)
