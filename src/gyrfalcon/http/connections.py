"""Connections with an end: limits on their number, and time-outs for clients that are slow on purpose or by mistake.

Uvicorn gives a connection no time-out but that between requests, takes headers of any length, and waits for ever for a
client that reads nothing. Each connection here is in one phase, most of which have a deadline; one task looks at all of
them a few times a second.
"""

from __future__ import annotations

import asyncio
import enum
from collections import Counter
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from gyrfalcon.http.wire import to_json
from gyrfalcon.metrics import Metrics

SWEEP_S = 0.25
# The application's own time-out for a body answers in the words of its dialect, so it goes first.
APPLICATION_FIRST_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """max_per_address: None is no limit. max_header_bytes: of a request's line and headers as they arrive."""

    max_connections: int = 2000
    max_per_address: int | None = None
    max_header_bytes: int = 32 * 1024
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    idle_timeout_s: float = 5.0
    stall_timeout_s: float = 60.0


class ConnectionWatch:
    """All connections of a server, their number by address, and the task that ends what has run out of time."""

    def __init__(self, limits: ConnectionLimits, metrics: Metrics) -> None:
        self.limits = limits
        self.metrics = metrics
        self._open: set[WatchedConnection] = set()
        self._by_address: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._open)

    def refusal(self, address: str) -> str | None:
        """Why one more connection from this address is too many, None where it is not."""
        if len(self._open) >= self.limits.max_connections:
            return "too_many"
        most = self.limits.max_per_address
        return "too_many_of_address" if most is not None and self._by_address[address] >= most else None

    def add(self, connection: WatchedConnection) -> None:
        self._open.add(connection)
        self._by_address[connection.address] += 1
        self.metrics.connections_open(len(self._open))

    def remove(self, connection: WatchedConnection) -> None:
        if connection in self._open:
            self._open.discard(connection)
            self._by_address[connection.address] -= 1
            if not self._by_address[connection.address]:
                del self._by_address[connection.address]
            self.metrics.connections_open(len(self._open))

    async def run(self) -> None:
        """End connections whose time is over, for ever; run it in a task of its own."""
        now = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(SWEEP_S)
            for connection in tuple(self._open):
                connection.check(now())


class _Phase(enum.Enum):
    """What a connection is waiting for."""

    IDLE = enum.auto()  # the first byte of a request
    HEADERS = enum.auto()
    BODY = enum.auto()
    ANSWER = enum.auto()  # the application: it has all of the request


class WatchedConnection(HttpToolsProtocol):
    """Uvicorn's connection, which knows what it waits for and since when."""

    def __init__(self, *arguments: Any, watch: ConnectionWatch, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.address = ""
        self._watch = watch
        self._phase = _Phase.IDLE
        self._deadline = 0.0
        self._head_bytes = 0  # of a request whose headers are not complete
        self._stalled_since: float | None = None
        self._unsent_bytes = 0
        self._refused = False

    # What asyncio tells

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        cause = self._watch.refusal(self.address)
        self._watch.add(self)
        # The first request's headers have their whole time from here on.
        self._enter(_Phase.IDLE, self._watch.limits.header_timeout_s)
        if cause is not None:
            self._refuse(cause, 503, "too many connections", "overloaded", b"retry-after: 1\r\n")

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        if self._phase in {_Phase.IDLE, _Phase.HEADERS}:
            self._head_bytes += len(data)
            most = self._watch.limits.max_header_bytes
            if self._head_bytes > most:
                text = f"the request's headers have more than {most} bytes"
                self._refuse("headers_too_large", 431, text, "headers_too_large")

    # What the parser tells

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._enter(_Phase.HEADERS, self._watch.limits.header_timeout_s)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._head_bytes = 0
        self._enter(_Phase.BODY, self._watch.limits.body_timeout_s + APPLICATION_FIRST_S)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self.cycle.response_complete:
            self._enter(_Phase.IDLE, self._watch.limits.idle_timeout_s)
        else:
            self._phase = _Phase.ANSWER

    # What the application's answer tells

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._phase is _Phase.ANSWER and not self.pipeline and self.cycle.response_complete:
            self._enter(_Phase.IDLE, self._watch.limits.idle_timeout_s)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP; amid an answer there is no room for another one."""
        self._refuse(None, 400, "the request is not valid HTTP/1.1", "bad_request")

    def check(self, now: float) -> None:
        """End the connection if its time is over."""
        if self._is_stalled(now):
            self._watch.metrics.connection_cut("stall")
            self.transport.abort()
        elif self.transport.is_closing() or self._phase is _Phase.ANSWER:
            return
        elif self.flow.read_paused:  # the next request is not read while this one runs
            self._deadline = now + self._watch.limits.body_timeout_s
        elif now >= self._deadline:
            self._end_phase()

    def _end_phase(self) -> None:
        limits = self._watch.limits
        match self._phase:
            case _Phase.HEADERS:
                text = f"the request's headers did not arrive within {limits.header_timeout_s:g} seconds"
                self._refuse("header_timeout", 408, text, "request_timeout")
            case _Phase.BODY:
                text = f"the request's body did not arrive within {limits.body_timeout_s:g} seconds"
                self._refuse("body_timeout", 408, text, "request_timeout")
            case _:
                self.transport.close()

    def _enter(self, phase: _Phase, timeout_s: float) -> None:
        self._phase = phase
        self._deadline = self.loop.time() + timeout_s

    def _is_stalled(self, now: float) -> bool:
        """Whether the client has taken nothing for too long of what waits for it."""
        unsent, before = self.transport.get_write_buffer_size(), self._unsent_bytes
        self._unsent_bytes = unsent
        if unsent == 0:
            self._stalled_since = None
        elif self._stalled_since is None or unsent < before:
            self._stalled_since = now
        return self._stalled_since is not None and now - self._stalled_since >= self._watch.limits.stall_timeout_s

    def _refuse(self, cause: str | None, status: int, text: str, error_type: str, headers: bytes = b"") -> None:
        """Answer without the application, unless it has begun to, and close the connection."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        if cause is None:
            self._watch.metrics.request_rejected("malformed")
        else:
            self._watch.metrics.connection_cut(cause)
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body = to_json({"error": text, "error_type": error_type})
            head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n" % len(body)
            self.transport.write(STATUS_LINE[status] + headers + head + b"\r\n" + body)
            if self.cycle is not None:
                self.cycle.disconnected = True  # of an application that still runs nothing more is written
                self.cycle.message_event.set()
        self.transport.close()
