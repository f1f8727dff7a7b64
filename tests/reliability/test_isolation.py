"""Section 1 of the checklist: no request stops or changes another."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gyrfalcon.engine.core import CoreLimits, EngineCore
from gyrfalcon.engine.interface import BeamParams, EngineRequest, SamplingParams
from gyrfalcon.engine.local import LocalEngine
from gyrfalcon.errors import GenerationFailed
from gyrfalcon.kernels.cpu import library
from gyrfalcon.presets import bundled_folder
from gyrfalcon.runner.interface import StepPlan
from gyrfalcon.runner.model_runner import ModelRunner, load_runner
from gyrfalcon.testing.collector import Collector
from gyrfalcon.testing.executor import FakeExecutor, fake_continuation

BLOCK, BUDGET, NUM_NEW = 16, 40, 24
MARK = 150  # an id that nobody generates and that brings the device down
LENGTHS = sorted({edge + step for edge in (BLOCK, 2 * BLOCK, BUDGET, 3 * BLOCK, 2 * BUDGET) for step in (-1, 0, 1)})


def request(request_id: str, prompt_ids: tuple[int, ...], max_new_tokens: int = 6, **others: object) -> EngineRequest:
    return EngineRequest(request_id=request_id, prompt_ids=prompt_ids, max_new_tokens=max_new_tokens, **others)


def fail_on_mark(plan: StepPlan) -> None:
    if MARK in plan.token_ids_T:
        raise RuntimeError("device error")


def test_1_1_a_step_that_fails_ends_the_request_that_caused_it_and_no_other() -> None:
    run = Collector(EngineCore(FakeExecutor(num_blocks=200, before_step=fail_on_mark), CoreLimits(max_rows=16)))
    good = [request(f"good {n}", (n, 2, 3)) for n in range(5)]
    search = request("search", (7, 8), beams=BeamParams(num_beams=2))
    for one in (*good, search):
        run.submit(one)
    run.step()
    run.submit(request("bad", (1, MARK, 3)))
    run.run()
    assert list(run.failures) == ["bad"]
    for one in good:
        assert run.tokens[one.request_id] == [fake_continuation(one.prompt_ids, 6)]
    alone = Collector(EngineCore(FakeExecutor(), CoreLimits()))
    alone.submit(search)
    alone.run()
    assert run.tokens["search"] == alone.tokens["search"]
    assert run.core.stats().cache_usage == 0.0


async def test_1_1_what_the_core_cannot_take_in_fails_alone() -> None:
    engine = LocalEngine(EngineCore(FakeExecutor(), CoreLimits()))
    with pytest.raises(GenerationFailed):
        async for _ in engine.generate(request("too wide", (2**40,))):
            pass
    events = [event async for several in engine.generate(request("good", (1, 2))) for event in several]
    assert len(events) == 1 + 6
    await engine.close()


def test_1_1_what_a_failed_request_computed_is_not_reused() -> None:
    run = Collector(EngineCore(FakeExecutor(block_size=4, before_step=fail_on_mark), CoreLimits(token_budget=8)))
    shared = tuple(range(8))
    run.submit(request("bad", (*shared, 8, 9, MARK)))
    run.run()
    run.submit(request("good", (*shared, 8, 9, 10)))
    run.run()
    assert run.prompts["good"].num_cached_tokens == 0


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def runner(request: pytest.FixtureRequest) -> ModelRunner:
    if library.load() is None:
        pytest.skip("the native kernels are not built")
    return load_eyas(bundled_folder(), dtype=request.param)


def load_eyas(folder: Path, *, dtype: str = "float32", num_blocks: int = 24) -> ModelRunner:
    return load_runner(
        folder,
        dtype=dtype,
        device="cpu",
        quantize=None,
        block_size=BLOCK,
        max_rows=16,
        max_total_tokens=200,
        cache_tokens=num_blocks * BLOCK,
        cache_bytes=None,
        cache_fraction=0.5,
        num_threads=1,
        keeps_packed=False,
        packed_directory=None,
        on_progress=lambda done, total: None,
    )


def crowd() -> list[EngineRequest]:
    """Prompts of every length about the edges of blocks and chunks; two thirds greedy, some with a common head."""
    chance = random.Random(4)
    text = tuple(chance.randrange(4000) for _ in range(2 * BUDGET + 2))
    made = []
    for number in range(32):
        length = LENGTHS[number % len(LENGTHS)]
        prompt = text[:length] if number % 2 else tuple(chance.randrange(4000) for _ in range(length))
        sampling = SamplingParams(do_sample=number % 3 == 2, seed=number, top_p=0.9)
        made.append(request(str(number), prompt, NUM_NEW, sampling=sampling))
    return made


def told(run: Collector, one: EngineRequest) -> tuple[list[list[int]], list[list[float]]]:
    return run.tokens[one.request_id], run.logprobs[one.request_id]


def test_1_2_every_bit_of_an_answer_is_the_same_alone_and_among_32_that_come_and_go(runner: ModelRunner) -> None:
    # Chunks as large as the budget from the first step on: how fast steps are must not decide whether blocks run out.
    limits = CoreLimits(token_budget=BUDGET, max_rows=16, max_draft_tokens=3, step_cost_tokens=2 * BUDGET)
    wanted = crowd()
    alone = {}
    for one in wanted:
        run = Collector(EngineCore(runner, CoreLimits(token_budget=512, prefix_caching=False)))
        run.submit(one)
        run.run()
        alone[one.request_id] = told(run, one)
    chance = random.Random(5)
    together = Collector(EngineCore(runner, limits))
    gone = {str(number) for number in chance.sample(range(32), 8)}
    for one in wanted:
        together.submit(one)
    leaving = sorted(gone)
    while together.core.has_work:
        together.step()
        if leaving and chance.random() < 0.3:
            together.core.abort(leaving.pop())
    for one in wanted:
        if one.request_id not in gone:
            assert told(together, one) == alone[one.request_id]
    assert not together.failures
    assert together.core.stats().num_preemptions > 0
    assert together.core.stats().prefix_hit_tokens > 0
    assert together.core.stats().cache_usage == 0.0


def test_1_3_an_abort_hits_the_one_request_whose_whole_id_it_names() -> None:
    run = Collector(EngineCore(FakeExecutor(), CoreLimits()))
    wanted = [request(name, (n, 5)) for n, name in enumerate(("r", "r1", "r10", "r1-0", "R1", ""))]
    for one in wanted:
        run.submit(one)
    run.step()
    run.core.abort("r1")
    run.core.abort("r1")
    run.run()
    assert sorted(run.finished) == sorted({one.request_id for one in wanted} - {"r1"})


def test_1_4_what_lies_in_the_cache_from_before_reaches_nobody(runner: ModelRunner) -> None:
    wanted = crowd()[:12]

    def answers(content: float) -> list[tuple[list[list[int]], list[list[float]]]]:
        for cache in runner._caches:
            cache.k_BSKE.fill_(content)
            cache.v_BSKE.fill_(content)
        run = Collector(EngineCore(runner, CoreLimits(token_budget=BUDGET, max_rows=8)))
        for one in wanted:
            run.submit(one)
        run.run()
        return [told(run, one) for one in wanted]

    assert answers(0.0) == answers(np.nan) == answers(np.inf)


def test_1_4_ids_that_the_logits_do_not_have_are_never_chosen(make_core: Callable[[], EngineCore]) -> None:
    run = Collector(make_core())
    sampling = SamplingParams(
        do_sample=True, seed=1, temperature=50.0, sequence_bias=(((4095,), 5.0),), bad_words_ids=((4095,),)
    )
    run.submit(request("a", (1, 2, 3), 60, sampling=sampling))
    run.run()
    assert all(0 <= token < 4095 for token in run.tokens["a"][0])


@pytest.fixture
def make_core(runner: ModelRunner) -> Callable[[], EngineCore]:
    return lambda: EngineCore(runner, CoreLimits())
