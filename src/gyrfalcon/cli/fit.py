"""`gyrfalcon fit`: how much memory a model takes, and what fits into a device, from config.json alone."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from gyrfalcon.cli.planning import (
    ConcurrencyOption,
    ContextOption,
    DeviceOption,
    DtypeOption,
    ModelArgument,
    QuantizeOption,
    plan_model,
    read_size,
    show_bytes,
)
from gyrfalcon.footprint import (
    DEFAULT_CONCURRENCY,
    How,
    Planned,
    block_bytes,
    largest_batch,
    largest_context,
    num_devices,
)
from gyrfalcon.memory import total_bytes

GIB = 1024**3
# What a device of this kind has for programs; its name promises a little more.
KNOWN_DEVICES = (
    ("T4, 16 GB", int(14.6 * GIB)),
    ("V100, 16 GB", int(15.7 * GIB)),
    ("A10 or L4, 24 GB", int(22.0 * GIB)),
    ("A100, 40 GB", int(39.4 * GIB)),
    ("L40S, 48 GB", int(44.4 * GIB)),
    ("A100 or H100, 80 GB", int(79.1 * GIB)),
    ("H100 NVL, 94 GB", int(93.1 * GIB)),
    ("H200, 141 GB", int(139.8 * GIB)),
)


def fit(
    model: ModelArgument,
    dtype: DtypeOption = "auto",
    quantize: QuantizeOption = None,
    context: ContextOption = None,
    concurrency: ConcurrencyOption = DEFAULT_CONCURRENCY,
    device: DeviceOption = None,
    device_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Memory of one device, such as 80GiB; several kinds if absent.", show_default=False
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say how much memory MODEL takes, and what fits, from its config.json alone: no weights are read or downloaded.

    A preset needs no network. On CPU without --device-memory the answer is for this machine.
    """
    given_bytes = read_size("--device-memory", device_memory)
    planned = plan_model(
        model,
        dtype=dtype,
        quantize=quantize,
        device=device,
        context=context,
        concurrency=concurrency,
        revision=revision,
    )
    if given_bytes is not None:
        places = [(device_memory or "", given_bytes)]
    elif planned.device == "cpu":
        places = [("this machine", total_bytes())]
    else:
        places = list(KNOWN_DEVICES)
    report = describe(planned, places)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print_report(planned, places)


def describe(planned: Planned, places: list[tuple[str, int]]) -> dict[str, object]:
    """The whole answer as values for JSON; sizes in bytes."""
    spec, load, whole = planned.spec, planned.load, planned.footprint()
    return {
        "model": planned.model,
        "family": spec.family,
        "parameters": spec.num_parameters,
        "dtype": planned.dtype,
        "quantize": planned.quantize,
        "device": planned.device,
        "context": load.context,
        "concurrency": load.concurrency,
        "max_context": spec.max_context,
        "weight_bytes": whole.weights,
        "cache_bytes": whole.cache,
        "kv_bytes_per_token": spec.kv_bytes_per_token(planned.dtype),
        "block_bytes": block_bytes(spec, planned.dtype, load.block_size),
        "activation_bytes": whole.activations,
        "runtime_bytes": whole.runtime,
        "total_bytes": whole.total,
        "devices": [
            {
                "name": name,
                "memory_bytes": memory,
                "fits": whole.total <= memory,
                "largest_batch": largest_batch(memory, spec, load, **_how(planned)),
                "largest_context": largest_context(memory, spec, load, **_how(planned)),
                "devices_needed": num_devices(memory, spec, load, **_how(planned)),
            }
            for name, memory in places
        ],
    }


def _how(planned: Planned) -> How:
    return {"dtype": planned.dtype, "quantize": planned.quantize, "device": planned.device}


def _print_report(planned: Planned, places: list[tuple[str, int]]) -> None:
    spec, load, whole = planned.spec, planned.load, planned.footprint()
    precision = planned.dtype if planned.quantize is None else f"{planned.quantize}, the rest {planned.dtype}"
    rows = [
        ("model", f"{planned.model} ({spec.family}, {spec.num_parameters:,} parameters)"),
        ("load", f"{load.concurrency:,} sequences of {load.context:,} tokens on {planned.device}"),
        ("weights", f"{show_bytes(whole.weights)} in {precision}"),
        ("KV cache", f"{show_bytes(whole.cache)}, {show_bytes(spec.kv_bytes_per_token(planned.dtype))} a token"),
        ("activations", f"{show_bytes(whole.activations)} for a step of {load.token_budget:,} tokens"),
        ("libraries", f"{show_bytes(whole.runtime)}"),
        ("in all", show_bytes(whole.total)),
    ]
    for name, text in rows:
        print(f"{name:<12} {text}")
    print()
    batch = f"sequences of {load.context:,}"
    tokens = f"tokens x {load.concurrency:,}"
    print(f"{'device memory':<34} {'fits':<5} {batch:>19} {tokens:>14} {'devices':>8}")
    for name, memory in places:
        count = largest_batch(memory, spec, load, **_how(planned))
        longest = largest_context(memory, spec, load, **_how(planned))
        needed = num_devices(memory, spec, load, **_how(planned))
        label = f"{show_bytes(memory)} ({name})" if name else show_bytes(memory)
        fits = "yes" if whole.total <= memory else "no"
        print(f"{label:<34} {fits:<5} {count or '-':>19} {longest or '-':>14} {needed or '-':>8}")
    if planned.device == "cuda" and any((num_devices(m, spec, load, **_how(planned)) or 1) > 1 for _, m in places):
        print("\nSeveral devices: by splitting heads and matrices. This version runs a model on one device.")
