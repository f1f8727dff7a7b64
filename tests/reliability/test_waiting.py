"""Section 4.2 of the checklist inside the engine: who has had a turn and finds no room there does not wait for ever."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from gyrfalcon.engine.core import CoreLimits, EngineCore
from gyrfalcon.engine.interface import BeamParams, EngineRequest, SamplingParams
from gyrfalcon.engine.local import LocalEngine
from gyrfalcon.testing.collector import Collector
from gyrfalcon.testing.engine import FakeEngine
from gyrfalcon.testing.executor import FakeExecutor, fake_continuation
from tests.reliability.house import ask, status_of, until

from .conftest import OpenHouse


class Clock:
    """Seconds that pass when a test says so."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def request(request_id: str, num_prompt: int, max_new_tokens: int, **others: object) -> EngineRequest:
    prompt_ids = tuple((sum(request_id.encode()) + n) % 90 for n in range(num_prompt))
    return EngineRequest(request_id=request_id, prompt_ids=prompt_ids, max_new_tokens=max_new_tokens, **others)


def make_run(clock: Clock, *, num_blocks: int = 9, **limits: int) -> Collector:
    """A core whose cache holds 32 tokens."""
    core = EngineCore(FakeExecutor(num_blocks=num_blocks, block_size=4), CoreLimits(**limits), clock=clock)
    return Collector(core)


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"num_choices": 2, "sampling": SamplingParams(do_sample=True, seed=3)},
        {"beams": BeamParams(num_beams=2)},
    ],
    ids=["plain", "choices", "beams"],
)
def test_4_2_what_finds_no_room_in_the_engine_ends_when_its_time_is_over(others: dict[str, object]) -> None:
    clock = Clock()
    run = make_run(clock)
    run.submit(request("first", 20, 11, begin_within_s=5.0))
    run.step()
    run.submit(request("second", 12, 4, begin_within_s=5.0, **others))
    clock.now_s += 4.9
    run.step()
    assert not run.overdue
    clock.now_s += 0.1
    run.step()
    assert list(run.overdue) == ["second"]
    assert "no room for the request for 5 seconds" in run.overdue["second"]
    assert run.core.stats().num_waiting == 0
    clock.now_s += 1000
    run.run()
    assert run.finished == ["first"]
    assert run.tokens["second"][0] == []
    assert not run.failures
    assert run.core.stats().cache_usage == 0


def test_4_2_room_that_comes_in_the_last_moment_is_taken() -> None:
    clock = Clock()
    run = make_run(clock)
    wanted = request("a", 20, 3, begin_within_s=0.0)
    run.submit(wanted)
    clock.now_s += 60
    run.run()
    assert run.finished == ["a"]
    assert not run.overdue
    assert run.tokens["a"] == [fake_continuation(wanted.prompt_ids, 3)]


def test_4_2_what_has_begun_is_not_dropped_however_often_it_is_preempted() -> None:
    clock = Clock()
    run = make_run(clock, num_blocks=17, max_rows=8)
    wanted = [request(str(n), 4, 24, begin_within_s=1.0) for n in range(6)]
    for one in wanted:
        run.submit(one)
    run.step()
    assert run.core.stats().num_waiting == 0
    while run.core.has_work:
        clock.now_s += 10
        run.step()
    assert run.core.stats().num_preemptions > 0
    assert not run.overdue
    for one in wanted:
        assert run.tokens[one.request_id] == [fake_continuation(one.prompt_ids, 24)]


def test_4_2_without_a_bound_a_request_waits_for_as_long_as_it_takes() -> None:
    clock = Clock()
    run = make_run(clock)
    run.submit(request("first", 20, 11))
    run.submit(request("second", 12, 4))
    while run.core.has_work:
        clock.now_s += 1000
        run.step()
    assert sorted(run.finished) == ["first", "second"]


PROMPT = "x y z " * 11
PLAIN = {"inputs": PROMPT, "parameters": {"max_new_tokens": 40}}
CHAT = {"prompt": PROMPT, "generate_kwargs": {"max_new_tokens": 40, "do_sample": False}}


@pytest.mark.parametrize(("path", "body"), [("/generate", PLAIN), ("/generate_stream", PLAIN), ("/chat", CHAT)])
async def test_4_2_the_time_in_the_engine_counts_towards_the_queue_timeout(
    house: OpenHouse, path: str, body: dict[str, object]
) -> None:
    executor = FakeExecutor(num_blocks=31, vocab_size=600, max_context=120, before_step=lambda plan: time.sleep(0.02))
    engine = LocalEngine(EngineCore(executor, CoreLimits(prefix_caching=False)))
    async with house(engine, service_options={"queue_timeout_s": 0.3}) as server:
        # Twice the cache is handed over, and the first request's prompt takes more than half of it.
        first = asyncio.create_task(ask(server.port, "/generate", PLAIN))
        await until(lambda: engine.stats().num_running == 1)
        second = asyncio.create_task(ask(server.port, path, body))
        await until(lambda: engine.stats().num_waiting == 1)
        answer = await second
        assert not first.done()
        if path == "/generate_stream":
            assert status_of(answer) == 200
            (event,) = [json.loads(line[5:]) for line in answer.splitlines() if line.startswith(b"data:")]
            assert event["error_type"] == "overloaded"
        else:
            assert status_of(answer) == 503
            assert b"\r\nretry-after: 1\r\n" in answer
            assert b"model is overloaded: the engine had no room" in answer
        assert status_of(await first) == 200
        assert server.metric("gyrfalcon_rejected_total", cause="queue_timeout") == 1
        await until(lambda: server.is_idle)


async def test_4_2_the_engine_gets_what_the_queue_has_left_of_the_time(house: OpenHouse) -> None:
    engine = FakeEngine(step_s=0.005, max_context=128)
    full = {"inputs": "x", "parameters": {"max_new_tokens": 120}}
    async with house(engine, service_options={"queue_timeout_s": 20.0}) as server:
        await asyncio.gather(*(ask(server.port, "/generate", full) for _ in range(17)))
        times = [each.begin_within_s for each in engine.requests]
        assert times[:16] == [20.0] * 16
        assert times[16] is not None
        assert 0 < times[16] < 19.7
