"""Going down in good order: first not ready, then no new work."""

from __future__ import annotations

from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from gyrfalcon.http.auth import routed_path
from gyrfalcon.http.wire import json_response
from gyrfalcon.metrics import Metrics

RETRY_AFTER_S = 5
MESSAGE = "the server is shutting down and takes no new requests"


class Drain:
    """How far the server is on its way down; it never turns back."""

    def __init__(self) -> None:
        self.is_ready = True
        self.takes_requests = True

    def announce(self) -> None:
        """From now on tell those who route requests to send them elsewhere."""
        self.is_ready = False

    def begin(self) -> None:
        """From now on refuse requests; what runs goes on."""
        self.is_ready = self.takes_requests = False


class DrainMiddleware:
    """Answers 503 to requests for work while the server drains; what only asks about it is answered as ever."""

    def __init__(self, app: ASGIApp, *, drain: Drain, kaito_paths: Collection[str], metrics: Metrics) -> None:
        self._app = app
        self._kaito_paths = frozenset(kaito_paths)
        self._drain = drain
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._drain.takes_requests or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        self._metrics.request_rejected("draining")
        is_kaito = routed_path(scope) in self._kaito_paths
        body = {"detail": MESSAGE} if is_kaito else {"error": MESSAGE, "error_type": "draining"}
        headers = {"Retry-After": str(RETRY_AFTER_S), "Connection": "close"}
        await json_response(body, 503, headers)(scope, receive, send)
