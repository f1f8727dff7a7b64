"""`gyrfalcon models`: the catalogue, as a table or as JSON."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from gyrfalcon.footprint import ModelSpec, Quantize, read_spec, weight_bytes
from gyrfalcon.presets import Preset, catalogue

_GIB = 1024**3
_WIDTH_WITHOUT_TERMINAL = 260  # columns; a pipe has none of its own, and folded cells are hard to search
# What weights take by precision: of what is not quantised, and quantised how.
_PRECISIONS: dict[str, tuple[str, Quantize | None]] = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "float16": ("float16", None),
    "int8": ("bfloat16", "int8"),
    "int4": ("bfloat16", "int4"),
}


def models(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the models that can be served by name, with what each needs and where its Kubernetes files are.

    Any other checkpoint of the same architectures is served by its folder or Hub id. `gyrfalcon fit NAME` works out
    what a load takes, `gyrfalcon k8s NAME` writes manifests.
    """
    described = [(preset, read_spec(preset.config_folder)) for preset in catalogue()]
    if as_json:
        print(json.dumps([_as_json(preset, spec) for preset, spec in described], indent=2))
    else:
        _print_table(described)


def _as_json(preset: Preset, spec: ModelSpec) -> dict[str, object]:
    return {
        "name": preset.name,
        "source": preset.source,
        "summary": preset.summary,
        "parameters": spec.num_parameters,
        "weight_bytes": {name: weight_bytes(spec, *how) for name, how in _PRECISIONS.items()},
        "kv_bytes_per_token": spec.kv_bytes_per_token(spec.dtype),
        "max_context": spec.max_context,
        "workspace": preset.workspace,
        "manifest": preset.manifest,
        "workload": preset.workload,
        "distributed": preset.is_distributed,
        "licence": preset.licence,
        "sample": preset.command,
    }


def _print_table(described: list[tuple[Preset, ModelSpec]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("Model name", "Model source", "Sample workspace", "Kubernetes workload", "Distributed inference"):
        table.add_column(heading, overflow="fold")
    for heading in ("Parameters", "float32", "16 bit", "int8", "int4"):
        table.add_column(heading, justify="right")
    table.add_column("Licence", overflow="fold")
    for preset, spec in described:
        table.add_row(
            preset.name,
            preset.source or "this package",
            preset.workspace,
            preset.workload,
            "yes" if preset.is_distributed else "no",
            _short(spec.num_parameters, ((10**9, " B"), (10**6, " M"))),
            *(
                _short(weight_bytes(spec, *_PRECISIONS[name]), ((_GIB, " GiB"), (1024**2, " MiB")))
                for name in ("float32", "bfloat16", "int8", "int4")
            ),
            preset.licence,
        )
    console = Console(width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL)
    console.print(table)
    console.print("Memory is that of the weights alone; `gyrfalcon fit NAME` adds the rest. To serve one: gyrfalcon")
    console.print("serve NAME. Sample workspaces are in the project's repository; `gyrfalcon k8s NAME` writes one.")


def _short(number: int, units: tuple[tuple[int, str], ...]) -> str:
    for size, unit in units:
        if number >= size:
            return f"{number / size:.1f}{unit}"
    size, unit = units[-1]
    return f"{number / size:.2f}{unit}"
