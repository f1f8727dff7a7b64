"""Write the tables of docs/tgi.md from the code's own routes, schema and metrics: python tools/dialect_page.py

The prose around the tables is written by hand; what stands between the marks is not.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from gyrfalcon.http.app import OPEN_PATHS, create_app
from gyrfalcon.http.settings import HttpSettings
from gyrfalcon.http.tgi_schema import GenerateParameters
from gyrfalcon.metrics import Metrics
from gyrfalcon.testing.engine import FakeEngine
from gyrfalcon.testing.text import text_service, write_tokenizer

PAGE = Path(__file__).resolve().parent.parent / "docs" / "tgi.md"
MARK = re.compile(r"<!-- (\w+): begin -->.*?<!-- \1: end -->", re.DOTALL)
TAG = "Text Generation Inference"
WIDTHS = {2**31 - 1: "2^31 - 1", 2**32 - 1: "2^32 - 1", 2**64 - 1: "2^64 - 1", -(2**31): "-2^31"}


def with_tables(page: str) -> str:
    """The page with the table at each of its marks written anew. Raises KeyError for a mark without a table."""
    with tempfile.TemporaryDirectory() as folder:
        service, metrics = text_service(FakeEngine(), write_tokenizer(Path(folder)))
        app = create_app(service, HttpSettings(), metrics)
    tables = {
        "routes": lambda: _table(("Method", "Path", "What it does", "API key"), routes(app)),
        "parameters": lambda: _table(("Parameter", "Type", "Default", "Meaning and rule"), parameters()),
        "tgi_metrics": lambda: _table(("Name", "Type", "Labels", "Meaning"), rows_of_metrics(metrics, "tgi_")),
        "own_metrics": lambda: _table(("Name", "Type", "Labels", "Meaning"), rows_of_metrics(metrics, "gyrfalcon_")),
    }
    return MARK.sub(lambda mark: f"<!-- {mark[1]}: begin -->\n\n{tables[mark[1]]()}\n\n<!-- {mark[1]}: end -->", page)


def routes(app: FastAPI) -> Iterator[tuple[str, ...]]:
    """Every operation that the OpenAPI document has of this dialect."""
    for path, operations in app.openapi()["paths"].items():
        for method, operation in operations.items():
            if TAG in operation.get("tags", ()):
                needs_key = not (method == "get" and path in OPEN_PATHS)
                yield method.upper(), f"`{path}`", operation["summary"], "yes" if needs_key else "no"


def parameters() -> Iterator[tuple[str, ...]]:
    """Every member of `parameters`."""
    for name, schema in GenerateParameters.model_json_schema()["properties"].items():
        default = GenerateParameters.model_fields[name].get_default(call_default_factory=True, validated_data={})
        yield f"`{name}`", _type(schema), f"`{_json(default)}`", schema["description"]


def rows_of_metrics(metrics: Metrics, prefix: str) -> Iterator[tuple[str, ...]]:
    """Every metric whose name begins so; those of TGI without the suffix that the client library puts to counters."""
    for family in sorted(metrics.registry.collect(), key=lambda family: family.name):
        if family.name.startswith(prefix):
            labels: dict[str, list[str]] = {}
            for sample in family.samples:
                for label, value in sample.labels.items():
                    values = labels.setdefault(label, [])
                    values += [] if value in values else [value]
            name = f"{family.name}_total" if family.type == "counter" and prefix != "tgi_" else family.name
            yield f"`{name}`", family.type, _labels(labels), family.documentation


def _labels(labels: dict[str, list[str]]) -> str:
    shown = {
        label: "`model`" if label == "model" else f"`{label}`: {', '.join(values)}"
        for label, values in labels.items()
        if label != "le"
    }
    return "; ".join(shown.values())


def _type(schema: dict[str, Any]) -> str:
    variants = schema.get("anyOf", [schema])
    return " or ".join(_variant(variant) for variant in variants)


def _variant(schema: dict[str, Any]) -> str:
    if "const" in schema:
        return _json(schema["const"])
    if "anyOf" in schema:
        return _type(schema)
    kind = schema.get("type", "anything")
    if "prefixItems" in schema:
        return f"[{', '.join(map(_variant, schema['prefixItems']))}]"
    if kind == "array":
        return f"array of {_plural(schema['items'])}"
    if "minimum" in schema:
        low, high = (WIDTHS.get(schema[end], str(schema[end])) for end in ("minimum", "maximum"))
        return f"{kind}, {low} to {high},"
    return str(kind)


def _plural(schema: dict[str, Any]) -> str:
    """Several of what the schema describes."""
    if "prefixItems" in schema:
        return _variant(schema)
    return f"arrays of {_plural(schema['items'])}" if schema["type"] == "array" else f"{schema['type']}s"


def _json(value: object) -> str:
    return json.dumps(value)


def _table(headings: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [headings, tuple("---" for _ in headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main() -> None:
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
