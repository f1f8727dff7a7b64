"""What every Engine promises, whatever stands behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from functools import partial

import pytest

from gyrfalcon.engine.core import CoreLimits, EngineCore
from gyrfalcon.engine.interface import (
    Engine,
    EngineRequest,
    FinishReason,
    PromptEvent,
    SamplingParams,
    StepReading,
    TokenEvent,
)
from gyrfalcon.engine.local import LocalEngine
from gyrfalcon.engine.process import ProcessEngine
from gyrfalcon.errors import EngineDead, GenerationFailed, QueueTimeout
from gyrfalcon.testing.executor import FakeExecutor, fake_continuation

MAX_CONTEXT = 4000


def build_core(on_progress: Callable[[int, int], None]) -> EngineCore:
    on_progress(1, 1)
    executor = FakeExecutor(num_blocks=2000, block_size=16, max_context=MAX_CONTEXT)
    return EngineCore(executor, CoreLimits(token_budget=64, max_rows=16))


async def make_local() -> Engine:
    return LocalEngine(build_core(lambda done, total: None))


async def make_process() -> Engine:
    return await ProcessEngine.start(build_core)


@pytest.fixture(params=[make_local, make_process], ids=["local", "process"])
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    made = await request.param()
    yield made
    await made.close()


def wanted(request_id: str, max_new_tokens: int = 6, **others: object) -> EngineRequest:
    return EngineRequest(request_id=request_id, prompt_ids=(1, 2, 3), max_new_tokens=max_new_tokens, **others)


async def collect(engine: Engine, request: EngineRequest) -> tuple[list[PromptEvent], list[TokenEvent]]:
    prompts, tokens = [], []
    async for events in engine.generate(request):
        assert events
        for event in events:
            (prompts if isinstance(event, PromptEvent) else tokens).append(event)
    return prompts, tokens


async def at_rest(engine: Engine) -> None:
    """Wait until nothing runs, waits or holds cache; fails after two seconds."""
    async with asyncio.timeout(2):
        while (stats := engine.stats()).num_running or stats.num_waiting or stats.cache_usage:
            await asyncio.sleep(0.01)


async def test_tokens_come_in_order_and_the_last_carries_the_finish_reason(engine: Engine) -> None:
    prompts, tokens = await collect(engine, wanted("a", prompt_logprobs=True))
    assert [token.token_id for token in tokens] == fake_continuation((1, 2, 3), 6)
    assert [token.finish_reason for token in tokens] == [None] * 5 + [FinishReason.LENGTH]
    assert [prompt.logprobs for prompt in prompts] == [(None, -0.25, -0.375)]


async def test_many_requests_at_once_each_get_their_own(engine: Engine) -> None:
    requests = [wanted(str(i), 20, sampling=SamplingParams(do_sample=True, seed=i), num_choices=2) for i in range(12)]
    answers = await asyncio.gather(*(collect(engine, request) for request in requests))
    for seed, (_, tokens) in enumerate(answers):
        for choice in range(2):
            mine = [token.token_id for token in tokens if token.choice == choice]
            assert mine == fake_continuation((1, 2, 3), 20, seed + choice)
    await at_rest(engine)


async def test_closing_the_iterator_frees_everything(engine: Engine) -> None:
    async with aclosing(engine.generate(wanted("a", 3900))) as stream:
        await anext(stream)
    await at_rest(engine)


async def test_a_cancelled_reader_frees_everything(engine: Engine) -> None:
    reader = asyncio.create_task(collect(engine, wanted("a", 3900)))
    await asyncio.sleep(0.05)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await at_rest(engine)


async def test_an_ended_choice_lets_the_others_finish(engine: Engine) -> None:
    request = wanted("a", 1000, num_choices=2, sampling=SamplingParams(do_sample=True))
    engine_tokens = []
    async for events in engine.generate(request):
        engine.end_choice("a", 0)
        engine_tokens += [event for event in events if isinstance(event, TokenEvent)]
    assert [token.token_id for token in engine_tokens if token.choice == 1] == fake_continuation((1, 2, 3), 1000, 1)
    assert sum(token.choice == 0 for token in engine_tokens) < 1000


async def test_what_never_fits_fails_alone(engine: Engine) -> None:
    neighbour = asyncio.create_task(collect(engine, wanted("good", 50)))
    with pytest.raises(GenerationFailed, match="4000 tokens"):
        await collect(engine, wanted("bad", MAX_CONTEXT))
    _, tokens = await neighbour
    assert len(tokens) == 50


async def test_what_does_not_begin_in_time_ends_so_and_what_has_begun_goes_on(engine: Engine) -> None:
    first = engine.generate(wanted("first", 1900, num_choices=16, sampling=SamplingParams(do_sample=True)))
    async with asyncio.timeout(10), aclosing(first) as stream:
        await anext(stream)
        with pytest.raises(QueueTimeout, match="no room for the request for"):
            await collect(engine, wanted("late", begin_within_s=0.05))
        assert await anext(stream)
    await at_rest(engine)


async def test_ending_what_is_unknown_or_over_changes_nothing(engine: Engine) -> None:
    engine.end_choice("never heard of", 0)
    async for _ in engine.generate(wanted("a", 5)):
        engine.end_choice("a", 7)
    engine.end_choice("a", 0)
    _, tokens = await collect(engine, wanted("b", 5))
    assert len(tokens) == 5


async def test_stop_ids_are_banned_before_the_fewest_tokens(engine: Engine) -> None:
    early = fake_continuation((1, 2, 3), 2)[1]
    for num_tokens, fewest in ((2, 0), (4, 4)):
        request = wanted(f"a{fewest}", 4, min_new_tokens=fewest, stop_token_ids=(early,))
        _, tokens = await collect(engine, request)
        assert len(tokens) == num_tokens


async def test_ending_every_choice_ends_the_stream(engine: Engine) -> None:
    async with asyncio.timeout(5):
        async for _ in engine.generate(wanted("a", 3900)):
            engine.end_choice("a", 0)
    await at_rest(engine)


async def test_every_step_is_told_to_whoever_watches() -> None:
    readings: list[StepReading] = []
    for engine in (
        LocalEngine(build_core(lambda done, total: None), on_step=readings.append),
        await ProcessEngine.start(build_core, on_step=readings.append),
    ):
        await collect(engine, wanted("a", 4))
        await engine.close()
    for own in (readings[:4], readings[4:]):
        assert [(step.num_prefill_tokens, step.num_decode_rows, step.num_admitted) for step in own] == [
            (3, 0, 1),
            (0, 1, 0),
            (0, 1, 0),
            (0, 1, 0),
        ]
        assert all(step.has_succeeded and step.schedule_s > 0 and step.commit_s > 0 for step in own)


async def test_health_facts_and_close(engine: Engine) -> None:
    assert (await engine.health()).is_healthy
    assert engine.facts.max_total_tokens == MAX_CONTEXT
    await engine.close()
    await engine.close()
    assert not (await engine.health()).is_healthy
    with pytest.raises(EngineDead):
        await collect(engine, wanted("late"))


async def test_closing_the_engine_fails_what_runs(engine: Engine) -> None:
    reader = asyncio.create_task(collect(engine, wanted("a", 3900)))
    await asyncio.sleep(0.05)
    await engine.close()
    with pytest.raises(EngineDead):
        await reader


def build_nothing(message: str, on_progress: Callable[[int, int], None]) -> EngineCore:
    raise ValueError(message)


async def test_a_core_that_cannot_be_built_reports_its_reason() -> None:
    from gyrfalcon.errors import ModelLoadError

    with pytest.raises(ModelLoadError, match="shard 3 is missing"):
        await ProcessEngine.start(partial(build_nothing, "shard 3 is missing"))
