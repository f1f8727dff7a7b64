"""The engine's process: what its death, its stop and its parent's death do."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import aclosing
from functools import partial

import psutil
import pytest

from gyrfalcon.engine import process as process_module
from gyrfalcon.engine.core import CoreLimits, EngineCore
from gyrfalcon.engine.interface import EngineRequest, EngineState
from gyrfalcon.engine.process import EngineChild, ProcessEngine
from gyrfalcon.errors import EngineDead, ModelLoadError
from gyrfalcon.runner.interface import StepPlan
from gyrfalcon.testing.executor import FakeExecutor


def slowly(plan: StepPlan) -> None:
    time.sleep(0.01)


def build_core(on_progress: Callable[[int, int], None]) -> EngineCore:
    return EngineCore(FakeExecutor(num_blocks=200, before_step=slowly), CoreLimits(token_budget=64, max_rows=4))


def request(request_id: str, max_new_tokens: int = 3) -> EngineRequest:
    return EngineRequest(request_id=request_id, prompt_ids=(1, 2), max_new_tokens=max_new_tokens)


async def read_all(engine: ProcessEngine, wanted: EngineRequest) -> int:
    return sum([len(events) async for events in engine.generate(wanted)])


def refuse_to_prepare() -> None:
    raise ModelLoadError("no module is called so")


async def until(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.02)


async def test_a_killed_engine_fails_its_requests_and_comes_back() -> None:
    engine = await ProcessEngine.start(build_core)
    try:
        async with aclosing(engine.generate(request("long", 600))) as stream:
            await anext(stream)
            first_pid = engine.pid
            assert first_pid is not None
            os.kill(first_pid, signal.SIGKILL)
            with pytest.raises(EngineDead, match="SIGKILL"):
                async for _ in stream:
                    pass
        assert not (await engine.health()).is_healthy
        with pytest.raises(EngineDead):
            await read_all(engine, request("refused"))
        await until(lambda: engine._state is EngineState.READY)
        assert engine.pid != first_pid
        assert await read_all(engine, request("after")) == 4
    finally:
        await engine.close()


async def test_a_child_that_was_started_ahead_becomes_the_engine() -> None:
    child = EngineChild()
    engine = await ProcessEngine.start(build_core, child=child)
    try:
        assert engine.pid == child.process.pid
        assert await read_all(engine, request("a")) == 4
    finally:
        await engine.close()
    assert not child.process.is_alive()
    child.end()  # whoever started it need not know what became of it


def test_a_child_that_nobody_needs_ends() -> None:
    child = EngineChild(partial(time.sleep, 60))
    assert child.process.is_alive()
    child.end()
    assert not child.process.is_alive()


async def test_a_child_that_died_ahead_is_an_error_that_says_how() -> None:
    child = EngineChild(partial(time.sleep, 60))
    child.process.kill()
    with pytest.raises(EngineDead, match="while it started by SIGKILL"):
        await ProcessEngine.start(build_core, child=child)


async def test_what_a_child_cannot_prepare_is_said() -> None:
    with pytest.raises(ModelLoadError, match="no module is called so"):
        await ProcessEngine.start(build_core, child=EngineChild(refuse_to_prepare))


async def test_an_engine_that_keeps_dying_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "LONGEST_BACKOFF_S", 0.01)
    monkeypatch.setattr(process_module, "DEATHS_TOLERATED", 2)
    given_up = asyncio.Event()
    engine = await ProcessEngine.start(build_core, on_give_up=given_up.set)
    try:
        for _ in range(2):
            await until(lambda: engine._state is EngineState.READY)
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
            await until(lambda: engine._state is not EngineState.READY)
        async with asyncio.timeout(10):
            await given_up.wait()
        assert "given up" in (await engine.health()).detail
    finally:
        await engine.close()


async def test_a_stopped_engine_is_reported_stuck_only_while_work_is_pending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "STUCK_AFTER_S", 0.3)
    engine = await ProcessEngine.start(build_core)
    assert engine.pid is not None
    try:
        await asyncio.sleep(0.4)
        assert (await engine.health()).is_healthy
        async with aclosing(engine.generate(request("a", 600))) as stream:
            await anext(stream)
            os.kill(engine.pid, signal.SIGSTOP)
            await asyncio.sleep(0.5)
            assert (await engine.health()).state is EngineState.STUCK
            os.kill(engine.pid, signal.SIGCONT)
            await anext(stream)
            assert (await engine.health()).is_healthy
    finally:
        os.kill(engine.pid, signal.SIGCONT)
        await engine.close()


def test_the_child_ends_with_its_parent() -> None:
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(
                """
                import asyncio
                from gyrfalcon.engine.process import ProcessEngine
                from gyrfalcon.testing.executor import build_fake_core

                async def main():
                    engine = await ProcessEngine.start(build_fake_core)
                    print(engine.pid, flush=True)
                    await asyncio.sleep(60)

                asyncio.run(main())
                """
            ),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    child.wait(timeout=5)
