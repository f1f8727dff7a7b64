"""How many headers a request may have; the HTTP parser itself takes any number."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from gyrfalcon.http.wire import json_response
from gyrfalcon.metrics import Metrics

MAX_FIELDS = 100
MAX_BYTES = 32 * 1024  # names and values together


class HeaderLimitMiddleware:
    """Answers 431 to a request with more or larger headers than any client needs."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = scope.get("headers", ())
        num_bytes = sum(len(name) + len(value) for name, value in headers)
        if len(headers) <= MAX_FIELDS and num_bytes <= MAX_BYTES:
            await self._app(scope, receive, send)
            return
        self._metrics.request_rejected("malformed")
        message = (
            f"the request has {len(headers)} headers of {num_bytes} bytes; at most {MAX_FIELDS} headers of "
            f"{MAX_BYTES} bytes are read"
        )
        answer = json_response({"error": message, "error_type": "headers_too_large"}, 431, {"Connection": "close"})
        await answer(scope, receive, send)
