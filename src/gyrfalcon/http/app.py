"""The application: every dialect's routes over one service, keys, metrics and documentation."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from gyrfalcon import __version__
from gyrfalcon.http import health, kaito, platforms, tgi, watermark
from gyrfalcon.http.auth import ApiKeyMiddleware, routed_path
from gyrfalcon.http.drain import Drain, DrainMiddleware
from gyrfalcon.http.header_limits import HeaderLimitMiddleware
from gyrfalcon.http.keys import KeyStore
from gyrfalcon.http.machine import read_machine, wants_machine
from gyrfalcon.http.openapi import openapi_document
from gyrfalcon.http.overload import OverloadMiddleware
from gyrfalcon.http.settings import HttpSettings
from gyrfalcon.http.wire import json_response
from gyrfalcon.metrics import METRICS_CONTENT_TYPE, Metrics
from gyrfalcon.service.interface import TextService

DESCRIPTION = "Text generation over the APIs of Hugging Face text-generation-inference and KAITO."
# The documentation page's script and style, from a package that carries them: it works without a network.
DOCS_PACKAGE = "fastapi_offline"
DOCS_FILES = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png")
SHOWN_HEADERS = (
    "x-compute-type",
    "x-compute-time",
    "x-compute-characters",
    "x-total-time",
    "x-validation-time",
    "x-queue-time",
    "x-inference-time",
    "x-time-per-token",
    "x-prompt-tokens",
    "x-generated-tokens",
    "x-model-id",
    "x-request-id",
)
# What tells nothing but what the server is and whether it is well; /metrics joins them where the operator says so.
OPEN_PATHS = (
    "/",
    "/health",
    *health.PATHS,
    "/healthz",
    "/ping",
    "/info",
    "/docs",
    "/openapi.json",
    "/api-doc/openapi.json",
    *(f"/docs/{name}" for name in DOCS_FILES),
)

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def create_app(
    service: TextService,
    settings: HttpSettings,
    metrics: Metrics,
    *,
    keys: KeyStore | None = None,
    drain: Drain | None = None,
    lifespan: Lifespan | None = None,
) -> FastAPI:
    """The ASGI application over a service that is ready. Raises SettingsError for paths that are taken.

    keys: in place of those of the settings. drain: what the caller will say of the server's end. lifespan: what runs
    around its serving, if anything.
    """
    keys = KeyStore(settings.api_keys) if keys is None else keys
    drain = drain or Drain()
    app = FastAPI(
        title="Gyrfalcon",
        version=__version__,
        description=DESCRIPTION,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    dialect = tgi.TgiDialect(service, settings, metrics)
    dialect.add_routes(app)
    kaito.KaitoDialect(service, settings, metrics).add_routes(app)
    watermark.WatermarkRoute(service, settings, metrics).add_routes(app)
    _add_metrics(app, metrics)
    health.HealthRoutes(service, drain).add_routes(app)
    own = [settings.health_path, "/metrics" if settings.open_metrics else None]
    open_paths = (*OPEN_PATHS, *filter(None, own))
    _add_documentation(app, open_paths, has_keys=keys.is_required)
    platforms.PlatformRoutes(service, settings, metrics, dialect).add_routes(app)
    _answer_head_requests(app)
    app.add_exception_handler(HTTPException, _no_such_route)
    # Innermost: who may not come in does not learn how full it is.
    app.add_middleware(
        OverloadMiddleware,
        service=service,
        routes={**tgi.GENERATING, **kaito.GENERATING, **platforms.generating(settings.predict_path)},
        limits=settings.body_limits,
    )
    app.add_middleware(DrainMiddleware, drain=drain, kaito_paths=kaito.PATHS, metrics=metrics)
    if keys.is_required:
        app.add_middleware(
            ApiKeyMiddleware,
            keys=keys,
            open_routes=[(method, path) for path in open_paths for method in ("GET", "HEAD")],
            kaito_paths=kaito.PATHS,
            metrics=metrics,
        )
    app.add_middleware(
        HeaderLimitMiddleware,
        max_fields=settings.max_header_fields,
        max_bytes=settings.max_header_bytes,
        metrics=metrics,
    )
    # Outermost: a browser's preflight request carries no key.
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(settings.cors_allow_origins) or ["*"],
        allow_methods=["GET", "POST"],
        allow_headers=["content-type", "authorization"],
        expose_headers=list(SHOWN_HEADERS),
    )
    return app


def _add_metrics(app: FastAPI, metrics: Metrics) -> None:
    async def render_metrics(request: Request) -> Response:
        if wants_machine(request.headers.get("accept")):
            return json_response(await asyncio.to_thread(read_machine))
        # Thousands of lines: in a thread, so that streams go on meanwhile.
        return Response(await asyncio.to_thread(metrics.render), headers={"Content-Type": METRICS_CONTENT_TYPE})

    app.add_api_route(
        "/metrics",
        render_metrics,
        methods=["GET"],
        summary="Metrics in Prometheus' text format",
        tags=["Operation"],
        response_model=None,
        responses={
            200: {
                "description": "The metrics; as JSON, a report of the machine as KAITO's service gives it",
                "content": {"text/plain": {"schema": {"type": "string"}}},
            }
        },
    )


def _add_documentation(app: FastAPI, open_paths: Collection[str], *, has_keys: bool) -> None:
    """The OpenAPI document under both of its names, and a page to read and try it."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            schemas = (*tgi.SCHEMAS, *kaito.SCHEMAS, *platforms.SCHEMAS, *watermark.SCHEMAS)
            app.openapi_schema = openapi_document(app, schemas, open_paths=open_paths, has_keys=has_keys)
        return app.openapi_schema

    async def openapi() -> Response:
        return json_response(document())

    async def docs(request: Request) -> Response:
        root = request.scope.get("root_path", "").rstrip("/")
        return get_swagger_ui_html(
            openapi_url=f"{root}/openapi.json",
            title="Gyrfalcon",
            swagger_js_url=f"{root}/docs/swagger-ui-bundle.js",
            swagger_css_url=f"{root}/docs/swagger-ui.css",
            swagger_favicon_url=f"{root}/docs/favicon.png",
        )

    app.openapi = document  # type: ignore[method-assign]
    app.add_api_route("/openapi.json", openapi, methods=["GET"], include_in_schema=False)
    app.add_api_route("/api-doc/openapi.json", openapi, methods=["GET"], include_in_schema=False)
    app.add_api_route("/docs", docs, methods=["GET"], include_in_schema=False, response_model=None)
    for name, path in _docs_files().items():
        app.add_api_route(
            f"/docs/{name}", _serve_file(path), methods=["GET"], include_in_schema=False, response_model=None
        )


def _docs_files() -> dict[str, Path]:
    """Where the documentation page's files are."""
    spec = importlib.util.find_spec(DOCS_PACKAGE)
    locations: Iterable[str] = (spec.submodule_search_locations if spec else None) or ()
    return {name: Path(location) / "static" / name for location in locations for name in DOCS_FILES}


def _serve_file(path: Path) -> Callable[[], Any]:
    async def serve() -> Response:
        return FileResponse(path, headers={"Cache-Control": "max-age=3600"})

    return serve


def _answer_head_requests(app: FastAPI) -> None:
    """HEAD wherever there is GET, with the same headers and no body."""
    for route in list(app.routes):
        if isinstance(route, APIRoute) and "GET" in (route.methods or ()):
            app.add_api_route(
                route.path, route.endpoint, methods=["HEAD"], include_in_schema=False, response_model=None
            )


async def _no_such_route(request: Request, error: Exception) -> Response:
    """404 and 405, empty for TGI's clients and with a detail where KAITO's look."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    path = routed_path(request.scope)
    if error.status_code == 405:
        methods = {
            method
            for route in request.app.routes
            if isinstance(route, Route) and route.path == path
            for method in route.methods or ()
        }
        headers = {"Allow": ", ".join(sorted(methods))}
    if path in kaito.PATHS:
        return json_response({"detail": error.detail}, error.status_code, headers)
    return Response(status_code=error.status_code, headers=headers)
