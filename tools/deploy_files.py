"""Write what of deploy/ is made from the catalogue and the footprints: python tools/deploy_files.py

Plain manifests and KAITO Workspaces of every preset, the Kustomize base and its overlays, the chart's values.
tests/deploy/test_files.py holds the files to what this makes of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gyrfalcon.deploy import objects
from gyrfalcon.deploy.bundle import helm_values, stream, to_yaml
from gyrfalcon.deploy.plan import KAITO_PORT, DeployPlan, choose_instance, plan_deployment
from gyrfalcon.footprint import DEFAULT_CONCURRENCY, Device, Planned, plan_load, read_spec
from gyrfalcon.presets import BUNDLED, catalogue, find_preset

ROOT = Path(__file__).resolve().parent.parent / "deploy"
CHART = "helm/gyrfalcon"
SAMPLE = "falcon-7b-instruct"
INFERENCE_SET = "falcon-7b-instruct"
NAME = "gyrfalcon"  # of the objects in the Kustomize base

Object = dict[str, Any]


def planned(model: str, device: Device | None = None) -> Planned:
    """A preset as `gyrfalcon k8s` plans it: on a GPU, and the bundled model on the CPU."""
    preset = find_preset(model)
    assert preset is not None
    spec = read_spec(preset.config_folder)
    where: Device = device or ("cpu" if model == BUNDLED else "cuda")
    load = plan_load(spec, device=where, concurrency=DEFAULT_CONCURRENCY)
    return Planned(model, spec, spec.dtype, None, where, load)  # type: ignore[arg-type]


def plan(model: str, device: Device | None = None, **options: Any) -> DeployPlan:
    """The same as a deployment."""
    return plan_deployment(planned(model, device), weights="package" if model == BUNDLED else "download", **options)


def all_files() -> dict[str, str]:
    """Every made file by its path below deploy/."""
    texts: dict[str, str] = {}
    for preset in catalogue():
        deployed = plan(preset.name)
        instance = choose_instance(deployed.planned)
        heading = f"{preset.name}: {preset.summary}.\nWritten by tools/deploy_files.py"
        texts[preset.manifest.removeprefix("deploy/")] = stream(
            objects.all_objects(deployed).values(), f"{heading}, as `gyrfalcon k8s {preset.name}` does."
        )
        texts[preset.workspace.removeprefix("deploy/")] = stream(
            [objects.workspace(deployed, instance)],
            f"{heading}, as `gyrfalcon k8s {preset.name} --kind kaito-workspace` does.\n"
            "On nodes of your own: leave out instanceType, and label them as the selector says.",
        )
    several = plan(INFERENCE_SET, replicas=2)
    texts["kaito/inferenceset.yaml"] = stream(
        [objects.inference_set(several, choose_instance(several.planned))],
        f"Two Workspaces of {INFERENCE_SET}. Written by tools/deploy_files.py, as `gyrfalcon k8s\n"
        f"{INFERENCE_SET} --kind kaito-inferenceset --replicas 2` does.",
    )
    texts[f"{CHART}/values.yaml"] = stream(
        [helm_values(plan(SAMPLE))],
        f"Values for {SAMPLE} on a GPU; deploy/helm/README.md explains them. For another model:\n"
        "gyrfalcon k8s MODEL --kind helm-values. Written by tools/deploy_files.py.",
    )
    texts |= {f"kustomize/{name}": text for name, text in _kustomize()}
    return texts


def base_plan() -> DeployPlan:
    """What every overlay starts from: it runs anywhere."""
    return plan(BUNDLED, name=NAME)


def overlays() -> dict[str, DeployPlan]:
    """The overlays by name, each as the plan whose objects it comes to."""
    return {
        "cpu": plan(SAMPLE, "cpu", name=NAME),
        "gpu": plan(SAMPLE, "cuda", name=NAME),
        "kaito": plan(SAMPLE, "cuda", name=NAME, port=KAITO_PORT),
    }


def _kustomize() -> Iterator[tuple[str, str]]:
    base = objects.all_objects(base_plan())
    for name, each in base.items():
        yield f"base/{name}.yaml", to_yaml(each)
    yield "base/kustomization.yaml", _kustomization(resources=[f"{name}.yaml" for name in base])
    for name, overlay in overlays().items():
        patches = []
        for key, target in objects.all_objects(overlay).items():
            changes = [change for change in difference(base[key], target) if not change["path"].endswith("/image")]
            if changes:
                patches.append({"target": {"kind": target["kind"], "name": NAME}, "patch": to_yaml(changes)})
        repository, _, tag = overlay.image.rpartition(":")
        yield (
            f"overlays/{name}/kustomization.yaml",
            _kustomization(resources=["../../base"], images=[{"name": repository, "newTag": tag}], patches=patches),
        )
    unscaled = [{"op": "remove", "path": "/spec/replicas"}]
    free_replicas = {"target": {"kind": "Deployment", "name": NAME}, "patch": to_yaml(unscaled)}
    scaled = base_plan()
    for name, extra, patches in (
        ("hpa", objects.autoscaler(scaled), [free_replicas]),
        ("keda", objects.scaled_object(scaled), [free_replicas]),
        ("service-monitor", objects.service_monitor(scaled), []),
    ):
        yield f"components/{name}/{name}.yaml", to_yaml(extra)
        yield (
            f"components/{name}/kustomization.yaml",
            _kustomization(kind="Component", resources=[f"{name}.yaml"], patches=patches),
        )


def _kustomization(*, kind: str = "Kustomization", **members: Any) -> str:
    version = "v1alpha1" if kind == "Component" else "v1beta1"
    given = {name: value for name, value in members.items() if value}
    return to_yaml({"apiVersion": f"kustomize.config.k8s.io/{version}", "kind": kind, **given})


def difference(old: Any, new: Any, path: str = "") -> list[Object]:
    """The operations of JSON Patch (RFC 6902) that make `new` of `old`. Lists of other lengths are replaced whole."""
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        changes: list[Object] = []
        for key in old | new:
            place = f"{path}/{key.replace('~', '~0').replace('/', '~1')}"
            if key not in new:
                changes.append({"op": "remove", "path": place})
            elif key not in old:
                changes.append({"op": "add", "path": place, "value": new[key]})
            else:
                changes += difference(old[key], new[key], place)
        return changes
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and _are_objects(old, new):
        return [change for index in range(len(old)) for change in difference(old[index], new[index], f"{path}/{index}")]
    return [{"op": "replace", "path": path, "value": new}]


def _are_objects(*lists: list[Any]) -> bool:
    return all(isinstance(each, dict) for items in lists for each in items)


def main() -> None:
    texts = all_files()
    for name, text in texts.items():
        path = ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print(f"written: {len(texts)} files in {ROOT}")


if __name__ == "__main__":
    main()
