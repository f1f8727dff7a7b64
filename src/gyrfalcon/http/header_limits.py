"""How many headers a request may have; the HTTP parser itself takes any number."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from gyrfalcon.http.wire import json_response
from gyrfalcon.metrics import Metrics


class HeaderLimitMiddleware:
    """Answers 431 to a request with more or larger headers than any client needs."""

    def __init__(self, app: ASGIApp, *, max_fields: int, max_bytes: int, metrics: Metrics) -> None:
        """max_bytes: names and values together."""
        self._app = app
        self._max_fields = max_fields
        self._max_bytes = max_bytes
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = scope.get("headers", ())
        num_bytes = sum(len(name) + len(value) for name, value in headers)
        if len(headers) <= self._max_fields and num_bytes <= self._max_bytes:
            await self._app(scope, receive, send)
            return
        self._metrics.request_rejected("malformed")
        message = (
            f"the request has {len(headers)} headers of {num_bytes} bytes; at most {self._max_fields} headers of "
            f"{self._max_bytes} bytes are read"
        )
        answer = json_response({"error": message, "error_type": "headers_too_large"}, 431, {"Connection": "close"})
        await answer(scope, receive, send)
