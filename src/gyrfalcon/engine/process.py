"""The engine in a child process of its own, supervised.

A crash there ends the requests it held, with a clear error, and nothing else: the process is started again after
1, 2, 4 .. 60 s, until it has died too often in too short a time. Between the processes runs one socket pair with
length-prefixed msgpack frames; the child notices the parent's end as the end of that stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import queue
import signal
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from gyrfalcon.engine.interface import (
    EngineEvent,
    EngineFacts,
    EngineHealth,
    EngineRequest,
    EngineState,
    EngineStats,
    StepReading,
)
from gyrfalcon.engine.messages import Command, EndChoice, Loading, Notice, Ready, Report, StartFailed, Stop
from gyrfalcon.engine.router import EventRouter
from gyrfalcon.errors import EngineDead, ModelLoadError, OperatorError

if TYPE_CHECKING:
    from gyrfalcon.engine.core import EngineCore

logger = logging.getLogger(__name__)

BuildCore = Callable[[Callable[[int, int], None]], "EngineCore"]
"""Makes the core inside the child; picklable. Its argument receives (bytes done, bytes total) while loading."""

Prepare = Callable[[], object]
"""Done in the child before it knows what to build, such as imports; picklable."""

STUCK_AFTER_S = 30.0
DEATHS_TOLERATED = 5
DEATHS_WINDOW_S = 600.0
LONGEST_BACKOFF_S = 60.0
STOP_GRACE_S = 5.0

_HEADER = struct.Struct("!I")
_encoder = msgspec.msgpack.Encoder()


def _nothing() -> None:
    pass


class EngineChild:
    """A child process that prepares itself for an engine and waits to be told which."""

    def __init__(self, prepare: Prepare = _nothing) -> None:
        """Starts a Python interpreter and feeds it: takes tens of milliseconds."""
        self.prepare = prepare
        self.connection, theirs = socket.socketpair()
        context = multiprocessing.get_context("spawn")
        its_orders, self._orders = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_child_main, args=(theirs, prepare, its_orders), name="gyrfalcon-engine", daemon=True
        )
        self.process.start()
        theirs.close()
        its_orders.close()

    def build(self, build_core: BuildCore) -> None:
        """Tell it what to build. Raises OSError when it has ended."""
        self._orders.send(build_core)
        self._orders.close()

    def end(self) -> None:
        """End it if it still runs; what it held is lost. Does nothing the second time."""
        self._orders.close()
        self.connection.close()  # which it notices
        self.process.join(STOP_GRACE_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class ProcessEngine:
    """Engine whose core lives in a supervised child process. Use `await ProcessEngine.start(...)`."""

    def __init__(
        self,
        build_core: BuildCore,
        child: EngineChild | None,
        on_progress: Callable[[int, int], None],
        on_step: Callable[[StepReading], None],
        on_give_up: Callable[[], None],
    ) -> None:
        self._build_core = build_core
        self._prepare = child.prepare if child else _nothing
        self._child = child
        self._on_progress = on_progress
        self._on_step = on_step
        self._on_give_up = on_give_up
        self._router = EventRouter()
        self._state = EngineState.STARTING
        self._detail = "the engine is starting"
        self._facts: EngineFacts | None = None
        self._stats = EngineStats()
        self._silent_since_s: float | None = None  # since when the child owes a report; None when it owes none
        self._deaths: deque[float] = deque()
        self._writer: asyncio.StreamWriter | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._closing = False

    @classmethod
    async def start(
        cls,
        build_core: BuildCore,
        *,
        child: EngineChild | None = None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        on_step: Callable[[StepReading], None] = lambda reading: None,
        on_give_up: Callable[[], None] = lambda: None,
    ) -> ProcessEngine:
        """Start the child and wait until its model is loaded.

        child: one that was started ahead, and is the engine's from now on; those after it prepare as it did. on_step
        is told of every step, in the event loop, and must be quick. on_give_up is called once when the child has died
        so often that it is not started again. Raises ModelLoadError with the child's own message when it cannot start.
        """
        engine = cls(build_core, child, on_progress, on_step, on_give_up)
        try:
            reader = await engine._connect(child or await engine._new_child())
            await engine._await_ready(reader)
        except BaseException:
            await engine._end_child()
            raise
        engine._supervisor = asyncio.create_task(engine._supervise(reader), name="engine-supervisor")
        return engine

    @property
    def facts(self) -> EngineFacts:
        if self._facts is None:
            raise EngineDead(self._detail)
        return self._facts

    @property
    def pid(self) -> int | None:
        """Process id of the child that runs now."""
        return self._child.process.pid if self._child else None

    async def generate(self, request: EngineRequest) -> AsyncGenerator[list[EngineEvent], None]:
        if self._state is not EngineState.READY:
            raise EngineDead(self._detail)
        async with aclosing(self._router.exchange(request, self._send)) as exchange:
            async for events in exchange:
                yield events

    def end_choice(self, request_id: str, choice: int) -> None:
        with contextlib.suppress(ConnectionError):
            self._send(EndChoice(request_id, choice))

    def stats(self) -> EngineStats:
        return msgspec.structs.replace(self._stats, peak_memory_bytes=_peak_memory_bytes(self.pid))

    async def health(self) -> EngineHealth:
        if self._state is EngineState.READY and self._silent_since_s is not None:
            silent_s = time.monotonic() - self._silent_since_s
            if silent_s > STUCK_AFTER_S:
                return EngineHealth(state=EngineState.STUCK, detail=f"no step has ended for {silent_s:.0f} s")
        return EngineHealth(state=self._state, detail=self._detail)

    async def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        with contextlib.suppress(ConnectionError):
            self._send(Stop())
        await self._end_child()
        self._mark_dead("the engine was closed")

    def _send(self, command: Command) -> None:
        if self._writer is None or self._writer.is_closing():
            raise ConnectionResetError(self._detail)
        self._writer.write(_frame(command))
        if self._silent_since_s is None:
            self._silent_since_s = time.monotonic()  # every command is followed by a report, whoever still listens

    async def _new_child(self) -> EngineChild:
        self._child = await asyncio.to_thread(EngineChild, self._prepare)
        return self._child

    async def _connect(self, child: EngineChild) -> asyncio.StreamReader:
        """Tell a child what to build, and listen to it."""
        with contextlib.suppress(OSError):  # that it has ended is what its stream says
            child.build(self._build_core)
        reader, self._writer = await asyncio.open_connection(sock=child.connection)
        return reader

    async def _await_ready(self, reader: asyncio.StreamReader) -> None:
        async for notice in _notices(reader):
            match notice:
                case Loading(done, total):
                    self._on_progress(done, total)
                case Ready(facts):
                    self._facts = facts
                    self._state, self._detail = EngineState.READY, ""
                    self._silent_since_s = None
                    return
                case StartFailed(message):
                    raise ModelLoadError(message)
        raise EngineDead(f"the engine process ended while it started{await self._how_it_ended()}")

    async def _supervise(self, reader: asyncio.StreamReader) -> None:
        while True:
            async for notice in _notices(reader):
                if isinstance(notice, Report):
                    self._stats = notice.stats
                    self._router.deliver(notice)
                    self._silent_since_s = time.monotonic() if self._router.awaits_events else None
                    if notice.step is not None:
                        self._on_step(notice.step)
            self._mark_dead(f"the engine process ended{await self._how_it_ended()}")
            logger.error(self._detail)
            restarted = await self._restart()
            if restarted is None:
                return
            reader = restarted

    async def _restart(self) -> asyncio.StreamReader | None:
        """A new child's stream once it is ready; None when it has died too often."""
        while True:
            now = time.monotonic()
            self._deaths.append(now)
            while now - self._deaths[0] > DEATHS_WINDOW_S:
                self._deaths.popleft()
            if len(self._deaths) >= DEATHS_TOLERATED:
                self._detail += f"; given up after {len(self._deaths)} deaths in {DEATHS_WINDOW_S:.0f} s"
                logger.error(self._detail)
                self._on_give_up()
                return None
            await self._end_child()
            await asyncio.sleep(_backoff_s(len(self._deaths)))
            self._state, self._detail = EngineState.STARTING, "the engine is restarting"
            try:
                reader = await self._connect(await self._new_child())
                await self._await_ready(reader)
            except OperatorError as error:
                self._mark_dead(str(error))
                logger.error("the engine could not be restarted: %s", error)
                continue
            logger.info("the engine has been restarted")
            return reader

    def _mark_dead(self, detail: str) -> None:
        self._state, self._detail = EngineState.DEAD, detail
        self._stats = EngineStats(num_steps=self._stats.num_steps)
        self._router.fail_all(EngineDead(detail))

    async def _how_it_ended(self) -> str:
        if self._child is None:
            return ""
        process = self._child.process
        await asyncio.to_thread(process.join, STOP_GRACE_S)
        code = process.exitcode
        if code is None:
            return ""
        return f" by {signal.Signals(-code).name}" if code < 0 else f" with exit status {code}"

    async def _end_child(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(ConnectionError):
                await self._writer.drain()
            self._writer.close()
            with contextlib.suppress(ConnectionError):
                await self._writer.wait_closed()
        if self._child is not None:
            await asyncio.to_thread(self._child.end)


def _backoff_s(num_deaths: int) -> float:
    """How long to wait before the next start."""
    return min(2.0 ** (num_deaths - 1), LONGEST_BACKOFF_S)


def _peak_memory_bytes(pid: int | None) -> int:
    """Largest resident size of a process so far; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _frame(message: Command | Notice) -> bytes:
    body = _encoder.encode(message)
    return _HEADER.pack(len(body)) + body


async def _notices(reader: asyncio.StreamReader) -> AsyncIterator[Notice]:
    """The child's messages until its stream ends."""
    decoder = msgspec.msgpack.Decoder(Notice)
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            (length,) = _HEADER.unpack(await reader.readexactly(_HEADER.size))
            yield decoder.decode(await reader.readexactly(length))


# What runs in the child


def _child_main(connection: socket.socket, prepare: Prepare, orders: Connection) -> None:
    # The terminal sends an interrupt to the whole group; the parent decides when the engine stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def say(notice: Notice) -> None:
        try:
            connection.sendall(_frame(notice))
        except OSError:
            os._exit(1)  # the parent is gone, and with it everyone who would want an answer

    inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, inbox), daemon=True).start()
    try:
        prepare()
        build_core: BuildCore = orders.recv()
        core = build_core(lambda done, total: say(Loading(done, total)))
    except (OperatorError, MemoryError) as error:
        say(StartFailed(str(error) or "out of memory"))
        return
    except Exception as error:
        logger.exception("the engine could not start")
        say(StartFailed(f"{type(error).__name__}: {error}"))
        return
    say(Ready(core.facts))
    # Only here, as the parent needs nothing of it.
    from gyrfalcon.engine.loop import run_loop

    run_loop(core, inbox, say)
    core.close()


def _listen(connection: socket.socket, inbox: queue.SimpleQueue[Command]) -> None:
    decoder = msgspec.msgpack.Decoder(Command)
    with connection.makefile("rb") as stream:
        while len(header := stream.read(_HEADER.size)) == _HEADER.size:
            inbox.put(decoder.decode(stream.read(*_HEADER.unpack(header))))
    os._exit(0)  # end of stream: the parent closed it or died, even in the middle of a step
