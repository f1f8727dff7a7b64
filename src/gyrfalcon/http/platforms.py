"""What hosting platforms send: SageMaker's /invocations and Vertex AI's /vertex, in the dialect of TGI."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.routing import Route

from gyrfalcon.errors import SettingsError
from gyrfalcon.http.overload import GeneratingRoute, Streams
from gyrfalcon.http.settings import HttpSettings
from gyrfalcon.http.tgi import LIST_OR_STREAM, TgiDialect, add_post
from gyrfalcon.http.tgi_render import render_error
from gyrfalcon.http.tgi_schema import VERTEX_EXAMPLE, CompatGenerateRequest, VertexRequest, VertexResponse
from gyrfalcon.http.wire import WRONG_SHAPE, MalformedBody, cancel_all, json_response, parse_body, unless_gone
from gyrfalcon.metrics import Metrics
from gyrfalcon.service.interface import Completion, GenerateCall, TextService

# Types that no route declares.
SCHEMAS = (VertexRequest,)
# What marks a body as one of OpenAI's, which these routes take once that dialect is served.
OPENAI_MEMBERS = ("messages", "prompt")


class PlatformRoutes:
    """Translates what the platforms send to calls of the dialect they wrap."""

    def __init__(self, service: TextService, settings: HttpSettings, metrics: Metrics, dialect: TgiDialect) -> None:
        self._service = service
        self._settings = settings
        self._metrics = metrics
        self._dialect = dialect

    def add_routes(self, app: FastAPI) -> None:
        """Call it last: the operator's own paths must not be those of other routes. Raises SettingsError."""
        add_post(
            app,
            "/invocations",
            self.invocations,
            CompatGenerateRequest,
            "Generate text on SageMaker, as `POST /` does",
            LIST_OR_STREAM,
        )
        predict, health = self._settings.predict_path, self._settings.health_path
        self._add_vertex(app, "/vertex")
        if predict is not None and predict != "/vertex":
            _check_free(app, "POST", predict, "AIP_PREDICT_ROUTE")
            self._add_vertex(app, predict)
        if health is not None and not _is_health(app, health, self._dialect):
            _check_free(app, "GET", health, "AIP_HEALTH_ROUTE")
            self._dialect.add_health(app, health)

    async def invocations(self, request: Request) -> Response:
        try:
            value = await self._dialect.read(request)
            _refuse_openai("/invocations", value)
            return await self._dialect.answer_compat(request, value)
        except Exception as error:
            return self._dialect.failure(error)

    async def vertex(self, request: Request) -> Response:
        """All instances at the same time; when one fails, so does the request."""
        try:
            value = await self._dialect.read(request)
            _check_number(_instances(value), self._settings.max_prompts)
            for instance in _instances(value):
                _refuse_openai("/vertex", instance)
            body = parse_body(value, VertexRequest)
            self._metrics.request_begins()  # besides each of the instances, as TGI counts
            calls = [self._dialect.call(instance, request) for instance in body.instances]
            completions = await unless_gone(request, self._complete_all(calls))
            texts = [
                (instance.inputs if instance.parameters.return_full_text else "") + completion.choices[0].text
                for instance, completion in zip(body.instances, completions, strict=True)
            ]
            return json_response({"predictions": texts})
        except Exception as error:
            return self._dialect.failure(error)

    async def _complete_all(self, calls: Sequence[GenerateCall]) -> list[Completion]:
        tasks = [asyncio.ensure_future(self._service.complete(call)) for call in calls]
        try:
            return await asyncio.gather(*tasks)
        finally:
            await cancel_all(*tasks)

    def _add_vertex(self, app: FastAPI, path: str) -> None:
        add_post(
            app,
            path,
            self.vertex,
            VertexRequest,
            "Generate texts on Vertex AI",
            {"model": VertexResponse},
            example=VERTEX_EXAMPLE,
        )


def generating(predict_path: str | None) -> dict[str, GeneratingRoute]:
    """The routes that generate. predict_path: that of the settings."""
    vertex = GeneratingRoute(render_error, Streams.NEVER)
    own = {} if predict_path is None else {predict_path: vertex}
    return {"/invocations": GeneratingRoute(render_error, Streams.IF_ASKED), "/vertex": vertex, **own}


def _refuse_openai(path: str, value: Any) -> None:
    """Raise MalformedBody for a body in one of OpenAI's shapes."""
    if isinstance(value, dict) and "inputs" not in value:
        for name in OPENAI_MEMBERS:
            if name in value:
                text = f"`{name}` is not supported at {path} by this version; send `inputs`"
                raise MalformedBody(422, f"{WRONG_SHAPE}: {text}", (name,))


def _instances(value: Any) -> list[Any]:
    instances = value.get("instances") if isinstance(value, dict) else None
    return instances if isinstance(instances, list) else []


def _check_number(instances: Sequence[Any], most: int) -> None:
    if len(instances) > most:
        text = f"instances: a request may have {most} prompts. Given: {len(instances)}"
        raise MalformedBody(422, f"{WRONG_SHAPE}: {text}", ("instances",))


def _is_health(app: FastAPI, path: str, dialect: TgiDialect) -> bool:
    return any(route.endpoint == dialect.health for route in _routes(app, path))


def _check_free(app: FastAPI, method: str, path: str, variable: str) -> None:
    if any(method in (route.methods or ()) for route in _routes(app, path)):
        raise SettingsError(variable, f"`{path}` is a route with another meaning here; give a path of its own")


def _routes(app: FastAPI, path: str) -> list[Route]:
    return [route for route in app.routes if isinstance(route, Route) and route.path == path]
