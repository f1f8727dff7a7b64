"""A client that makes load and costs little itself, in a process of its own, on bare sockets.

    python -m tests.reliability.load PORT --seconds 10 --rate 1500 [--keep-alive]     # come what may
    python -m tests.reliability.load PORT --seconds 10 --clients 64 [--keep-alive]    # each waits for its answer

Prints one JSON object, a `Load`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

import uvloop

from tests.reliability.house import request_bytes

# Longer than any answer may take: a connection without one then counts as status 0.
GIVEN_UP_S = 30.0
TICK_S = 0.002


@dataclass(slots=True)
class Load:
    """What came of a load. statuses, seconds: of every answer, from the moment its connection was asked for; status 0
    is none. late_s: how late requests of a rate were begun, by the client's own fault.
    """

    statuses: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    took_s: float = 0.0
    client_cpu_s: float = 0.0

    def of(self, status: int) -> list[float]:
        """Seconds of the answers with this status."""
        return [took_s for each, took_s in zip(self.statuses, self.seconds, strict=True) if each == status]


class _Connection(asyncio.Protocol):
    """One connection, which has at most one request under way."""

    def __init__(self, request: bytes, loop: asyncio.AbstractEventLoop) -> None:
        self._request = request
        self._loop = loop
        self._received = b""
        self._whole = -1  # bytes of the answer, once its head is known
        self._answered: asyncio.Future[int] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def ask(self) -> asyncio.Future[int]:
        """Send the request; the answer's status, 0 where the connection ends before it."""
        assert self._transport is not None
        self._received, self._whole = b"", -1
        self._answered = self._loop.create_future()
        self._transport.write(self._request)
        return self._answered

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._whole < 0:
            head, end, _ = self._received.partition(b"\r\n\r\n")
            if not end:
                return
            for line in head.split(b"\r\n"):
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    self._whole = len(head) + len(end) + int(value)
        if self._whole >= 0 and len(self._received) >= self._whole:
            self._end(int(self._received[9:12]))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._end(0)

    def _end(self, status: int) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(status)


class Client:
    """Sends the same request again and again."""

    def __init__(self, port: int, path: str, body: Any, *, keeps_alive: bool) -> None:
        self.load = Load()
        self._port = port
        self._request = request_bytes(path, body, close=not keeps_alive)
        self._keeps_alive = keeps_alive
        self._idle: deque[_Connection] = deque()

    async def one(self) -> None:
        """Send a request and note what comes back."""
        started, status = time.perf_counter(), 0
        try:
            async with asyncio.timeout(GIVEN_UP_S):
                connection = await self._connect()
                status = await connection.ask()
            if self._keeps_alive and connection.is_open:
                self._idle.append(connection)
            else:
                connection.close()
        except (OSError, TimeoutError):
            pass
        self.load.statuses.append(status)
        self.load.seconds.append(time.perf_counter() - started)

    async def at_rate(self, rate: float, seconds: float) -> None:
        """So many requests a second, whatever becomes of them; return when all are answered."""
        started, sent = time.perf_counter(), 0
        async with asyncio.TaskGroup() as group:
            while sent < rate * seconds:
                now = time.perf_counter() - started
                while sent < rate * min(now, seconds):
                    self.load.late_s.append(now - sent / rate)
                    group.create_task(self.one())
                    sent += 1
                await asyncio.sleep(TICK_S)
        self.load.took_s = time.perf_counter() - started

    async def one_after_another(self, num_clients: int, seconds: float) -> None:
        """So many clients, each of which asks again when it is answered."""
        started = time.perf_counter()

        async def client() -> None:
            while time.perf_counter() - started < seconds:
                await self.one()

        await asyncio.gather(*(client() for _ in range(num_clients)))
        self.load.took_s = time.perf_counter() - started

    async def _connect(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: _Connection(self._request, loop), "127.0.0.1", self._port)
        return connection


async def make_load(port: int, path: str, body: Any, *arguments: str) -> Load:
    """Let a process of its own make this load. arguments: as on the command line."""
    command = [sys.executable, "-m", "tests.reliability.load", str(port), "--path", path, "--body", json.dumps(body)]
    ended = await asyncio.to_thread(
        subprocess.run, [*command, *arguments], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    return Load(**json.loads(ended.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("--path", default="/generate")
    parser.add_argument("--body", type=json.loads, default={"inputs": "x", "parameters": {"max_new_tokens": 40}})
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=None, help="requests a second, answered or not")
    parser.add_argument("--clients", type=int, default=64, help="without a rate: requests at the same time")
    parser.add_argument("--keep-alive", action="store_true", help="use a connection again; or a new one each time")
    arguments = parser.parse_args()
    client = Client(arguments.port, arguments.path, arguments.body, keeps_alive=arguments.keep_alive)
    gc.disable()  # its pauses would be measured as the server's
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if arguments.rate is None:
            runner.run(client.one_after_another(arguments.clients, arguments.seconds))
        else:
            runner.run(client.at_rate(arguments.rate, arguments.seconds))
    client.load.client_cpu_s = time.process_time()
    sys.stdout.write(json.dumps(asdict(client.load)))


if __name__ == "__main__":
    main()
