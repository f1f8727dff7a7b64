"""Write the tables of docs/models.md and docs/fit.md from the catalogue: python tools/models_page.py

The prose around the tables is written by hand; what stands between the marks is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from gyrfalcon.deploy.plan import choose_instance
from gyrfalcon.footprint import largest_batch, weight_bytes
from gyrfalcon.presets import catalogue
from tools.deploy_files import plan, planned

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = ("models.md", "fit.md")
MARK = re.compile(r"<!-- (\w+): begin -->.*?<!-- \1: end -->", re.DOTALL)
GIB = 1024**3


def with_tables(page: str) -> str:
    """The page with the table at each of its marks written anew. Raises KeyError for a mark without a table."""
    tables = {
        "catalogue": lambda: _table(
            ("Model name", "Model source", "Sample workspace", "Kubernetes workload", "Distributed inference"),
            catalogue_rows(),
        ),
        "sizes": lambda: _table(
            ("Model name", "Parameters", "16 bit", "int8", "int4", "KV cache a token", "Context", "Licence"),
            size_rows(),
        ),
        "nodes": lambda: _table(
            ("Model name", "In all, 16 sequences", "KAITO's node", "Sequences it holds"), node_rows()
        ),
    }
    return MARK.sub(lambda mark: f"<!-- {mark[1]}: begin -->\n\n{tables[mark[1]]()}\n\n<!-- {mark[1]}: end -->", page)


def catalogue_rows() -> Iterator[tuple[str, ...]]:
    """The documented form: where a model comes from, and the files that run it."""
    for preset in catalogue():
        source = f"[{preset.source}](https://huggingface.co/{preset.source})" if preset.source else "this package"
        yield (
            preset.name,
            source,
            f"[{Path(preset.workspace).name}](../{preset.workspace})",
            f"[{preset.workload}](../{preset.manifest})",
            "yes" if preset.is_distributed else "no",
        )


def size_rows() -> Iterator[tuple[str, ...]]:
    """What each takes."""
    for preset in catalogue():
        spec = planned(preset.name).spec
        sizes = [weight_bytes(spec, "bfloat16", quantize) for quantize in (None, "int8", "int4")]  # type: ignore[arg-type]
        yield (
            preset.name,
            f"{spec.num_parameters:,}",
            *(_gib(size) for size in sizes),
            f"{spec.kv_bytes_per_token('bfloat16') / 1024:g} KiB",
            f"{spec.max_context:,}",
            preset.licence,
        )


def node_rows() -> Iterator[tuple[str, ...]]:
    """The node that each sample workspace asks for."""
    for preset in catalogue():
        deployed = plan(preset.name)
        instance = choose_instance(deployed.planned)
        how = deployed.planned
        count = largest_batch(instance.memory_bytes, how.spec, how.load, dtype=how.dtype, device=how.device)
        yield (
            preset.name,
            _gib(how.footprint().total),
            f"`{instance.name}`",
            f"{count:,} of {how.load.context:,} tokens",
        )


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 1024**2:.0f} MiB"


def _table(headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [headings, tuple("---" for _ in headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    for name in PAGES:
        page = DOCS / name
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"written: {page}")


if __name__ == "__main__":
    main()
