"""The OpenAPI document. Bodies are read by hand, within limits, so the framework must be told of their types."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

REFERENCE = "#/components/schemas/{model}"


def json_body(model: type[BaseModel], example: dict[str, Any]) -> dict[str, Any]:
    """What a route passes as `openapi_extra`, so that its body has this type and example."""
    content = {"schema": {"$ref": REFERENCE.format(model=model.__name__)}, "example": example}
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def openapi_document(
    app: FastAPI, schemas: Sequence[type[BaseModel]], *, open_paths: Collection[str], has_keys: bool
) -> dict[str, Any]:
    """The application's document.

    schemas: types that only `json_body` and written references name. open_paths: where GET needs no key.
    """
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes, tags=app.openapi_tags
    )
    modes: list[tuple[type[BaseModel], JsonSchemaMode]] = [(schema, "validation") for schema in schemas]
    _, definitions = models_json_schema(modes, ref_template=REFERENCE)
    components = document.setdefault("components", {})
    components["schemas"] = components.get("schemas", {}) | definitions["$defs"]
    if has_keys:
        components["securitySchemes"] = {"ApiKey": {"type": "http", "scheme": "bearer"}}
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                if method != "get" or path not in open_paths:
                    operation["security"] = [{"ApiKey": []}]
    return document
