"""`gyrfalcon models`: the catalogue, as a table or as JSON."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from gyrfalcon.presets import PRECISION_BITS, Preset, catalogue

_GIB = 1024**3
_WIDTH_WITHOUT_TERMINAL = 160  # columns; a pipe has none of its own, and folded cells are hard to search


def models(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the models that can be served by name, with what each needs.

    Any other checkpoint of the same architectures is served by its folder or Hub id.
    """
    if as_json:
        print(json.dumps([_as_json(preset) for preset in catalogue()], indent=2))
    else:
        _print_table(catalogue())


def _as_json(preset: Preset) -> dict[str, object]:
    return {
        "name": preset.name,
        "source": preset.source,
        "summary": preset.summary,
        "parameters": preset.num_parameters,
        "weight_bytes": {precision: preset.weight_bytes(precision) for precision in PRECISION_BITS},
        "kv_bytes_per_token": preset.kv_bytes_per_token,
        "max_context": preset.max_context,
        "workload": preset.workload,
        "distributed": preset.is_distributed,
        "licence": preset.licence,
        "sample": preset.command,
    }


def _print_table(presets: tuple[Preset, ...]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Name", overflow="fold")
    table.add_column("Source", overflow="fold")
    table.add_column("Parameters", justify="right")
    for precision in ("float32", "16 bit", "int8", "int4"):
        table.add_column(precision, justify="right")
    for heading in ("Workload", "Distributed", "Licence"):
        table.add_column(heading, overflow="fold")
    for preset in presets:
        table.add_row(
            preset.name,
            preset.source or "this package",
            _short(preset.num_parameters, ((10**9, " B"), (10**6, " M"))),
            *(
                _short(preset.weight_bytes(precision), ((_GIB, " GiB"), (1024**2, " MiB")))
                for precision in ("float32", "bfloat16", "int8", "int4")
            ),
            preset.workload,
            "yes" if preset.is_distributed else "no",
            preset.licence,
        )
    console = Console(width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL)
    console.print(table)
    console.print("Memory is that of the weights alone; the KV cache comes on top. int8 and int4 are for planning:")
    console.print("this version loads float32, bfloat16 and float16. To serve one: gyrfalcon serve NAME")


def _short(number: int, units: tuple[tuple[int, str], ...]) -> str:
    for size, unit in units:
        if number >= size:
            return f"{number / size:.1f}{unit}"
    size, unit = units[-1]
    return f"{number / size:.2f}{unit}"
