"""The engine inside this process: the core's loop in a thread. For the terminal, for tests and for embedding."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from gyrfalcon.engine.core import EngineCore
from gyrfalcon.engine.interface import (
    EngineEvent,
    EngineFacts,
    EngineHealth,
    EngineRequest,
    EngineState,
    EngineStats,
    StepReading,
)
from gyrfalcon.engine.loop import run_loop
from gyrfalcon.engine.messages import Command, EndChoice, Report, Stop
from gyrfalcon.engine.router import EventRouter
from gyrfalcon.errors import EngineDead

logger = logging.getLogger(__name__)


class LocalEngine:
    """Engine over a core that runs in a thread of this process. Must be made inside a running event loop."""

    def __init__(self, core: EngineCore, *, on_step: Callable[[StepReading], None] = lambda reading: None) -> None:
        """on_step: told of every step, in the event loop; must be quick."""
        self._core = core
        self._on_step = on_step
        self._loop = asyncio.get_running_loop()
        self._router = EventRouter()
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._stats = core.stats()
        self._dead: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def facts(self) -> EngineFacts:
        return self._core.facts

    async def generate(self, request: EngineRequest) -> AsyncGenerator[list[EngineEvent], None]:
        if self._dead is not None:
            raise EngineDead(self._dead)
        async with aclosing(self._router.exchange(request, self._inbox.put)) as exchange:
            async for events in exchange:
                yield events

    def end_choice(self, request_id: str, choice: int) -> None:
        self._inbox.put(EndChoice(request_id, choice))

    def stats(self) -> EngineStats:
        return self._stats

    async def health(self) -> EngineHealth:
        if self._dead is not None:
            return EngineHealth(state=EngineState.DEAD, detail=self._dead)
        return EngineHealth(state=EngineState.READY)

    async def close(self) -> None:
        if self._thread.is_alive():
            self._inbox.put(Stop())
            await asyncio.to_thread(self._thread.join)
        self._die("the engine was closed")

    def _run(self) -> None:
        try:
            run_loop(self._core, self._inbox, self._post)
        except Exception:
            logger.exception("the engine loop ended")
            self._loop.call_soon_threadsafe(self._die, "the engine loop ended by an error")
        finally:
            self._core.close()

    def _post(self, report: Report) -> None:
        self._loop.call_soon_threadsafe(self._deliver, report)

    def _deliver(self, report: Report) -> None:
        self._stats = report.stats
        self._router.deliver(report)
        if report.step is not None:
            self._on_step(report.step)

    def _die(self, detail: str) -> None:
        self._dead = self._dead or detail
        self._router.fail_all(EngineDead(self._dead))
