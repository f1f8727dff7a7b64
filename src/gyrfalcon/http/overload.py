"""The door that a crowd sees: while there is no room, requests to generate are turned away before they are parsed.

What they ask for is looked at only where the dialect's way of refusing depends on it. The service turns away by itself
what this door lets in and there is no room for; here it costs a fraction of that, and what runs is not held up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from gyrfalcon.errors import Overloaded
from gyrfalcon.http.auth import caller_of_scope, routed_path
from gyrfalcon.http.wire import (
    STREAM_HEADERS,
    STREAM_TYPE,
    BodyLimits,
    ClientGone,
    MalformedBody,
    ServerStopping,
    read_within,
    sse,
    to_json,
)
from gyrfalcon.service.interface import TextService
from gyrfalcon.tracing import trace_headers

RawHeaders = list[tuple[bytes, bytes]]

# In a string of JSON a quotation mark has a backslash before it: this is found only where it is a member.
_ASKS_FOR_STREAM = re.compile(rb'(?<!\\)"stream"\s*:\s*true')


class Streams(Enum):
    """When a route answers with a stream, on which an error is an event."""

    NEVER = auto()
    ALWAYS = auto()
    IF_ASKED = auto()  # by `stream` in the body


@dataclass(frozen=True, slots=True)
class GeneratingRoute:
    """How a route that generates says what went wrong. render: an error's status, body and headers in its dialect."""

    render: Callable[[Exception], tuple[int, Mapping[str, object], dict[str, str]]]
    streams: Streams


class OverloadMiddleware:
    """Answers requests to generate while the service has no room for any."""

    def __init__(
        self, app: ASGIApp, *, service: TextService, routes: Mapping[str, GeneratingRoute], limits: BodyLimits
    ) -> None:
        """routes: by the path that the router matches. limits: within which a body is waited for."""
        self._app = app
        self._service = service
        self._routes = dict(routes)
        self._limits = limits
        # A few at most: a service has only so many bounds.
        self._answers: dict[tuple[str, bool, str], tuple[int, RawHeaders, bytes]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        path = routed_path(scope)
        route = self._routes.get(path)
        refusal = None if route is None else self._refusal(scope)
        if route is None or refusal is None:
            await self._app(scope, receive, send)
            return
        # Read to its end, as many clients look for an answer only when they have sent all of their request.
        body = await self._read(Request(scope, receive))
        is_stream = route.streams is Streams.ALWAYS or (
            route.streams is Streams.IF_ASKED and _ASKS_FOR_STREAM.search(body or b"") is not None
        )
        key = (path, is_stream, str(refusal))
        if key not in self._answers:
            self._answers[key] = _answer(route, refusal, is_stream=is_stream)
        status, headers, content = self._answers[key]
        if body is None:  # the rest of it would be taken for the next request
            headers = [*headers, (b"connection", b"close")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    def _refusal(self, scope: Scope) -> Overloaded | None:
        return self._service.turn_away(caller_of_scope(scope), trace_headers(Headers(scope=scope)))

    async def _read(self, request: Request) -> bytes | None:
        """The request's body; None where it is larger than allowed, or ends too late or not at all."""
        try:
            return await read_within(request, self._limits)
        except (MalformedBody, ClientGone, ServerStopping):
            return None


def _answer(route: GeneratingRoute, refusal: Overloaded, *, is_stream: bool) -> tuple[int, RawHeaders, bytes]:
    """Status, headers and content of what the route says."""
    status, body, headers = route.render(refusal)
    if is_stream:
        status, content, headers = 200, sse(body), {**STREAM_HEADERS, "Content-Type": STREAM_TYPE}
    else:
        content, headers = to_json(body), {**headers, "Content-Type": "application/json"}
    headers["Content-Length"] = str(len(content))
    return status, [(name.lower().encode(), value.encode()) for name, value in headers.items()], content
