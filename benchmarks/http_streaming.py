"""What the HTTP side costs a token: events a second, and the time from an engine's event to a client's bytes.

    python benchmarks/http_streaming.py [--connections 64] [--seconds 5]

The engine costs nothing: every step it has one token for every stream, made before the clock starts. The server runs
in this process, pinned to one core where the system lets it; the clients run in another process on another core. For
throughput the engine steps as soon as the streams have taken the last tokens; for latency it steps at a fixed
interval, and a client's clock is compared with the moment at which the step was handed out (both processes read the
same monotonic clock).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import uvicorn
import uvloop

from gyrfalcon.engine.interface import EngineEvent, EngineFacts, EngineRequest, FinishReason, PromptEvent, TokenEvent
from gyrfalcon.http.app import create_app
from gyrfalcon.http.settings import HttpSettings
from gyrfalcon.testing.engine import FakeEngine
from gyrfalcon.testing.server import free_port
from gyrfalcon.testing.text import text_service, write_tokenizer

FIRST_ID, NUM_IDS = 3, 300
MAX_NEW_TOKENS = 4000


class SteppedEngine(FakeEngine):
    """One token for every stream a step; a step begins when asked for."""

    def __init__(self) -> None:
        super().__init__(vocab_size=400, max_context=MAX_NEW_TOKENS + 100)
        self._queues: list[asyncio.Queue[list[EngineEvent]]] = []
        self.step_times: list[float] = []
        self._events: list[list[EngineEvent]] = [[TokenEvent(0, FIRST_ID + i, -0.5)] for i in range(NUM_IDS)]

    @property
    def num_streams(self) -> int:
        return len(self._queues)

    def step(self) -> None:
        position = len(self.step_times)
        self.step_times.append(time.monotonic())
        events = self._events[position % NUM_IDS]
        for queue in self._queues:
            queue.put_nowait(events)

    def finish(self) -> None:
        for queue in self._queues:
            queue.put_nowait([TokenEvent(0, FIRST_ID, -0.5, FinishReason.LENGTH)])

    async def generate(self, request: EngineRequest) -> AsyncGenerator[list[EngineEvent], None]:
        queue: asyncio.Queue[list[EngineEvent]] = asyncio.Queue()
        self._queues.append(queue)
        try:
            yield [PromptEvent(0.0, 0)]
            while True:
                yield await queue.get()
        finally:
            self._queues.remove(queue)

    @property
    def is_drained(self) -> bool:
        return all(queue.empty() for queue in self._queues)


class Reader(asyncio.Protocol):
    """A client: sends its request when connected and notes when events arrive."""

    def __init__(self, request: bytes, arrivals: list[tuple[float, int]]) -> None:
        self._request = request
        self._arrivals = arrivals

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self._arrivals.append((time.monotonic(), data.count(b"data: ")))


def run_clients(port: int, num_connections: int, pipe: Connection) -> None:
    """In the client process: read until told to stop, then send what arrived and when, by connection."""
    pin(1)
    body = b'{"inputs": "The falcon", "parameters": {"max_new_tokens": %d}}' % MAX_NEW_TOKENS
    head = b"POST /generate_stream HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = head + b"Content-Length: %d\r\n\r\n" % len(body) + body

    async def read() -> list[list[tuple[float, int]]]:
        loop = asyncio.get_running_loop()
        arrivals: list[list[tuple[float, int]]] = [[] for _ in range(num_connections)]
        for own in arrivals:
            await loop.create_connection(lambda own=own: Reader(request, own), "127.0.0.1", port)
        await asyncio.to_thread(pipe.recv)
        return arrivals

    pipe.send(uvloop.run(read()))


@dataclass(frozen=True, slots=True)
class Measured:
    """What one run found; cpu_s is the server's own time, which a busy machine does not stretch."""

    num_events: int
    elapsed_s: float
    cpu_s: float
    delays_s: list[float]  # from step to client, an event


async def measure(num_connections: int, seconds: float, interval_s: float | None) -> Measured:
    """Stream for so long; interval_s: seconds between steps, None for as fast as possible."""
    pin(0)
    engine, port = SteppedEngine(), free_port()
    with tempfile.TemporaryDirectory() as folder:
        service, metrics = text_service(
            engine, write_tokenizer(Path(folder)), max_concurrent_requests=num_connections + 1
        )
        config = uvicorn.Config(
            create_app(service, HttpSettings(), metrics), port=port, log_level="error", lifespan="off", access_log=False
        )
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        ours, theirs = multiprocessing.Pipe()
        clients = multiprocessing.get_context("spawn").Process(target=run_clients, args=(port, num_connections, theirs))
        clients.start()
        while engine.num_streams < num_connections:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)

        engine.step_times.clear()
        started_s, started_cpu_s = time.monotonic(), time.process_time()
        while time.monotonic() - started_s < seconds and len(engine.step_times) < MAX_NEW_TOKENS - 10:
            engine.step()
            if interval_s is None:
                await asyncio.sleep(0)
                while not engine.is_drained:
                    await asyncio.sleep(0)
            else:
                await asyncio.sleep(interval_s)
        num_steps, elapsed_s = len(engine.step_times), time.monotonic() - started_s
        cpu_s = time.process_time() - started_cpu_s
        await asyncio.sleep(0.3)
        ours.send(None)
        arrivals = await asyncio.to_thread(ours.recv)
        clients.join()
        server.should_exit = True
        with contextlib.suppress(asyncio.CancelledError):
            await serving
    delays = []
    for own in arrivals:
        arrived = [when for when, count in own for _ in range(count)]
        assert len(arrived) == num_steps, f"a client saw {len(arrived)} of {num_steps} events"
        delays += [when - stepped for when, stepped in zip(arrived, engine.step_times, strict=True)]
    return Measured(num_connections * num_steps, elapsed_s, cpu_s, delays)


def pin(core: int) -> None:
    """Stay on one core, so that client and server do not share it."""
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setaffinity(0, {core % (os.cpu_count() or 1)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--interval-ms", type=float, default=20.0)
    arguments = parser.parse_args()
    facts: EngineFacts = SteppedEngine().facts
    assert facts.vocab_size > FIRST_ID + NUM_IDS
    fast = uvloop.run(measure(arguments.connections, arguments.seconds, None))
    print(
        f"{arguments.connections} connections: {fast.num_events / fast.elapsed_s:.0f} events/s; "
        f"{1e6 * fast.cpu_s / fast.num_events:.1f} us of CPU an event, {fast.num_events / fast.cpu_s:.0f} events "
        "a CPU second"
    )
    for connections in (1, arguments.connections):
        delays = uvloop.run(measure(connections, arguments.seconds, arguments.interval_ms / 1000)).delays_s
        p50, p99 = statistics.median(delays), statistics.quantiles(delays, n=100)[98]
        # The streams of a step are served one after the other: half of them are before the median one.
        per_event = p50 / max(1, connections / 2)
        print(
            f"{connections:3d} connections: step to client p50 {1e6 * p50:.0f} us, p99 {1e6 * p99:.0f} us; "
            f"per event of its step at p50 {1e6 * per_event:.0f} us"
        )


if __name__ == "__main__":
    main()
