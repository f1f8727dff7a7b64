"""Health for orchestrators: whether to leave the server running, and whether to send it requests."""

from __future__ import annotations

from enum import Enum
from typing import Any

from fastapi import FastAPI
from starlette.responses import Response

from gyrfalcon.http.drain import Drain
from gyrfalcon.http.tgi_schema import ErrorResponse
from gyrfalcon.http.wire import json_response
from gyrfalcon.service.interface import EngineState, TextService

TAGS: list[str | Enum] = ["Operation"]
LIVE_PATH = "/health/live"
READY_PATHS = ("/health/ready", "/ready")
PATHS = (LIVE_PATH, *READY_PATHS)


class HealthRoutes:
    """Neither runs a generation nor waits for one, so both answer under any load."""

    def __init__(self, service: TextService, drain: Drain) -> None:
        self._service = service
        self._drain = drain

    def add_routes(self, app: FastAPI) -> None:
        self._add(app, LIVE_PATH, self.live, "Whether to leave the server running")
        for path in READY_PATHS:
            self._add(app, path, self.ready, "Whether to send the server requests")

    async def live(self) -> Response:
        """503 only for what a restart of the whole server helps: a dead engine is restarted by the server itself."""
        health = await self._service.health()
        if health.state is EngineState.STUCK:
            return _unwell(health.detail)
        return json_response({"status": "live"})

    async def ready(self) -> Response:
        if not self._drain.is_ready:
            return _unwell("the server is shutting down")
        health = await self._service.health()
        if not health.is_healthy:
            return _unwell(health.detail or f"the engine is {health.state.value}")
        return json_response({"status": "ready"})

    def _add(self, app: FastAPI, path: str, endpoint: Any, summary: str) -> None:
        app.add_api_route(
            path,
            endpoint,
            methods=["GET"],
            summary=summary,
            tags=TAGS,
            response_model=None,
            responses={200: {"description": "Yes"}, 503: {"model": ErrorResponse, "description": "No"}},
        )


def _unwell(detail: str) -> Response:
    return json_response({"error": detail, "error_type": "healthcheck"}, 503)
