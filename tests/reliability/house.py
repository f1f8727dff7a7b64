"""A server in this process, and clients that speak HTTP by hand."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gyrfalcon.http.app import create_app
from gyrfalcon.http.connections import ConnectionLimits
from gyrfalcon.http.drain import Drain
from gyrfalcon.http.keys import KeyStore
from gyrfalcon.http.server import Server
from gyrfalcon.http.settings import HttpSettings
from gyrfalcon.metrics import Metrics
from gyrfalcon.service.generation import GenerationService
from gyrfalcon.testing.engine import FakeEngine
from gyrfalcon.testing.text import text_service

WAYS_TO_LEAVE = ("FIN", "RST", "half")
JSON = "Content-Type: application/json\r\n"


@dataclass(frozen=True, slots=True)
class House:
    """A server and what is behind it."""

    port: int
    engine: FakeEngine
    service: GenerationService
    metrics: Metrics
    server: Server
    drain: Drain

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits or runs."""
        (stats,) = self.service.stats().values()
        return stats.num_waiting == stats.num_running == 0


@asynccontextmanager
async def open_house(
    engine: FakeEngine,
    folder: Path,
    *,
    connections: ConnectionLimits | None = None,
    keys: KeyStore | None = None,
    tls: Any = None,
    service_options: dict[str, Any] | None = None,
    **settings: Any,
) -> AsyncIterator[House]:
    """The application over the engine on a free port."""
    service, metrics = text_service(engine, folder, **(service_options or {}))
    drain = Drain()
    app = create_app(service, HttpSettings(**settings), metrics, keys=keys, drain=drain)
    server = Server(app, metrics, connections or ConnectionLimits(), grace_s=0, tls=tls)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        running = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            await until(lambda: server.started)
            yield House(listener.getsockname()[1], engine, service, metrics, server, drain)
        finally:
            server.should_exit = True
            await running


def request_bytes(path: str, body: Any = None, *, method: str = "POST", headers: str = "", close: bool = True) -> bytes:
    """A whole request; a body that is not bytes is sent as JSON."""
    payload = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\n{JSON}Content-Length: {len(payload)}\r\n{headers}"
    return head.encode() + (b"Connection: close\r\n" if close else b"") + b"\r\n" + payload


async def connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port)


async def ask(port: int, path: str, body: Any = None, **options: Any) -> bytes:
    """Everything that comes back for one request."""
    return await send(port, request_bytes(path, body, **options))


async def send(port: int, data: bytes) -> bytes:
    """Everything that comes back for these bytes until the server closes the connection."""
    reader, writer = await connect(port)
    try:
        writer.write(data)
        return await reader.read()
    finally:
        writer.close()


def leave(writer: asyncio.StreamWriter, way: str) -> None:
    """Close the connection in one of WAYS_TO_LEAVE."""
    if way == "RST":
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    elif way == "half":
        writer.write_eof()
        writer.transport.abort()
    else:
        writer.close()


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def body_of(answer: bytes) -> Any:
    """The JSON of an answer that is not chunked."""
    return json.loads(answer.partition(b"\r\n\r\n")[2])


async def until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)
