"""Sections 4.3, 4.4, 7.1 and 7.2 of the checklist: the scheduler and the sampler in any order of events."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gyrfalcon.engine.block_pool import PADDING_BLOCK
from gyrfalcon.engine.core import CoreLimits, EngineCore
from gyrfalcon.engine.interface import BeamParams, EngineRequest, SamplingParams
from gyrfalcon.engine.scheduler import MOST_OVERTAKINGS, MOST_PREEMPTIONS, ScheduledRow
from gyrfalcon.engine.sequence import SequenceGroup
from gyrfalcon.runner.sampler import choose
from gyrfalcon.testing.collector import Collector
from gyrfalcon.testing.columns import columns
from gyrfalcon.testing.executor import FakeExecutor, fake_continuation

# A night's run: GYRFALCON_PROPERTY_RUNS=5000, read before the tests take such variables away.
NUM_RUNS = int(os.environ.get("GYRFALCON_PROPERTY_RUNS", "60"))
MOST_ROWS, NUM_BLOCKS, BLOCK = 6, 33, 2


def request(request_id: str, num_prompt: int, max_new_tokens: int, **others: object) -> EngineRequest:
    prompt_ids = tuple((sum(request_id.encode()) + n) % 90 for n in range(num_prompt))
    return EngineRequest(request_id=request_id, prompt_ids=prompt_ids, max_new_tokens=max_new_tokens, **others)


class SchedulerMachine(RuleBasedStateMachine):
    """Submit, abort, end and step in any order, with a cache that is too small for what is asked of it."""

    def __init__(self) -> None:
        super().__init__()
        executor = FakeExecutor(num_blocks=NUM_BLOCKS, block_size=BLOCK)
        limits = CoreLimits(token_budget=12, max_rows=MOST_ROWS, max_draft_tokens=3, step_cost_tokens=2)
        self.core = EngineCore(executor, limits)
        self.executor = executor
        self.run = Collector(self.core)
        self.wanted: dict[str, EngineRequest] = {}
        self.gone: set[str] = set()
        self.order: list[str] = []  # of arrival
        self.started: list[str] = []  # of the first step
        self.preempted: Counter[SequenceGroup] = Counter()
        self.pool, self.scheduler = self.core._pool, self.core._scheduler

    @rule(
        num_prompt=st.integers(1, 20),
        max_new_tokens=st.integers(1, 20),
        kind=st.sampled_from(["plain", "plain", "choices", "beams"]),
    )
    def submit(self, num_prompt: int, max_new_tokens: int, kind: str) -> None:
        request_id = str(len(self.wanted))
        others: dict[str, object] = {}
        if kind == "choices":
            others = {"num_choices": 2, "sampling": SamplingParams(do_sample=True, seed=3)}
        if kind == "beams":
            others = {"beams": BeamParams(num_beams=2)}
        one = request(request_id, num_prompt, max_new_tokens, **others)
        self.wanted[request_id] = one
        self.run.submit(one)
        if request_id not in self.run.failures:
            self.order.append(request_id)

    @precondition(lambda self: self.core._groups)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.core._groups)))
        self.core.abort(request_id)
        self.gone.add(request_id)

    @rule()
    def step(self) -> None:
        oldest = self.scheduler._running[0] if self.scheduler._running else None
        before = {id(group): group.num_preemptions for group in self.core._groups.values()}
        held = {id(s) for s in oldest.sequences if s.blocks} if oldest else set()
        self.run.step()
        if oldest and oldest.sequences and len(oldest.sequences) == 1 and len(held) == 1:
            assert oldest.num_preemptions == before[id(oldest)]
        fresh = [i for i in self.order if i in self.core._groups and self.core._groups[i].started_s is not None]
        self.started += [i for i in fresh if i not in self.started]

    @rule(count=st.integers(2, 12))
    def several_steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    @invariant()
    def each_block_is_free_or_counted_once_for_each_owner(self) -> None:
        owners = Counter(
            block for group in self.core._groups.values() for sequence in group.sequences for block in sequence.blocks
        )
        assert PADDING_BLOCK not in owners
        for block in range(1, NUM_BLOCKS):
            assert self.pool.references(block) == owners[block]
        assert self.pool.num_free + len(owners) == self.pool.num_usable
        assert all(len(set(s.blocks)) == len(s.blocks) for g in self.core._groups.values() for s in g.sequences)

    @invariant()
    def nobody_writes_to_a_block_of_another(self) -> None:
        if not self.executor.plans:
            return
        plan = self.executor.plans[-1]
        written: Counter[int] = Counter()
        for row, length in enumerate(plan.query_lens_R.tolist()):
            first = int(plan.context_lens_R[row]) // BLOCK
            last = (int(plan.context_lens_R[row]) + length - 1) // BLOCK
            written.update(plan.block_tables_RW[row, first : last + 1].tolist())
        assert all(count == 1 for count in written.values())
        assert len(plan.query_lens_R) <= MOST_ROWS

    @invariant()
    def nobody_is_preempted_or_overtaken_too_often(self) -> None:
        for group in self.core._groups.values():
            if group.request.num_choices == 1:
                assert group.num_preemptions <= MOST_PREEMPTIONS
            assert group.num_overtakings <= MOST_OVERTAKINGS

    def teardown(self) -> None:
        self.run.run()
        assert self.pool.num_free == self.pool.num_usable
        for request_id in self.order:
            one = self.wanted[request_id]
            if request_id in self.gone:
                continue
            assert request_id in self.run.finished
            if one.num_choices == 1 and one.beams is None:
                assert self.run.tokens[request_id] == [fake_continuation(one.prompt_ids, one.max_new_tokens)]


def test_7_1_every_order_of_events_keeps_the_books() -> None:
    machine = SchedulerMachine.TestCase()
    machine.settings = settings(max_examples=NUM_RUNS, stateful_step_count=40, deadline=None)
    machine.runTest()


def test_4_3_nobody_is_preempted_more_than_four_times_and_all_end_with_their_own_tokens() -> None:
    # Many that grow far in a cache for little more than one of them: each would be thrown out over and over.
    core = EngineCore(
        FakeExecutor(num_blocks=95, block_size=1), CoreLimits(token_budget=64, max_rows=16, step_cost_tokens=64)
    )
    run = Collector(core)
    wanted = [request(str(n), 2, 60) for n in range(20)]
    groups = []
    for one in wanted:
        run.submit(one)
        groups.append(core._groups[one.request_id])
    run.run(most_steps=20_000)
    assert max(group.num_preemptions for group in groups) == MOST_PREEMPTIONS  # six without the rule
    assert groups[0].num_preemptions == 0
    for one in wanted:
        assert run.tokens[one.request_id] == [fake_continuation(one.prompt_ids, 60)]


def test_4_4_small_prompts_overtake_one_that_does_not_fit_but_not_for_ever() -> None:
    core = EngineCore(FakeExecutor(num_blocks=33, block_size=2), CoreLimits(token_budget=64, max_rows=8))
    run = Collector(core)
    run.submit(request("long", 10, 50))
    run.step()
    run.submit(request("large", 56, 4))
    small = [request(f"small {n}", 2, 2) for n in range(30)]
    for one in small:
        run.submit(one)
    large = core._groups["large"]
    before: list[str] = []
    while large.started_s is None:
        before = [request_id for request_id in run.prompts if request_id.startswith("small")]
        run.step()
    assert len(before) == large.num_overtakings == MOST_OVERTAKINGS
    assert before == [one.request_id for one in small[:MOST_OVERTAKINGS]]
    run.run()
    assert len(run.finished) == 32


def test_4_4_a_request_that_has_begun_is_never_overtaken() -> None:
    core = EngineCore(FakeExecutor(num_blocks=18, block_size=2), CoreLimits(token_budget=64, max_rows=8))
    run = Collector(core)
    for one in (request("first", 2, 30), request("second", 2, 30)):
        run.submit(one)
    while core.stats().num_preemptions == 0:
        run.step()
    second = core._groups["second"]
    for n in range(5):
        run.submit(request(f"small {n}", 1, 1))
    while second in core._scheduler._waiting:
        assert not any(request_id.startswith("small") for request_id in run.prompts)
        run.step()
    run.run()
    assert second.num_overtakings == 0
    assert len(run.finished) == 7


@pytest.mark.parametrize("num_streams", [1, 5])
def test_4_4_a_long_prompt_at_most_doubles_the_steps_of_those_that_decode(num_streams: int) -> None:
    executor = FakeExecutor(num_blocks=600, block_size=4, max_context=2000)
    core = EngineCore(executor, CoreLimits(token_budget=512, max_rows=16, step_cost_tokens=8))
    run = Collector(core)
    for n in range(num_streams):
        run.submit(request(str(n), 3, 400))
    run.step()
    run.submit(request("long", 900, 2))
    first = len(executor.plans)
    while "long" not in run.finished:
        run.step()
    costs = [8 + len(plan.token_ids_T) for plan in executor.plans[first:-2]]
    assert max(costs) <= 2 * (8 + num_streams)
    assert len(costs) == -(-900 // (8 + num_streams)) - 1  # nor less than it may
    for n in range(num_streams):  # and none of the streams missed a step
        assert len(run.tokens[str(n)][0]) == 1 + len(executor.plans) - first


def test_4_4_a_long_prompt_alone_has_the_whole_budget() -> None:
    executor = FakeExecutor(num_blocks=600, block_size=4, max_context=2000)
    run = Collector(EngineCore(executor, CoreLimits(token_budget=512, step_cost_tokens=8)))
    run.submit(request("long", 900, 1))
    run.run()
    assert [len(plan.token_ids_T) for plan in executor.plans] == [512, 388]


legal = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.01, 100),
        "top_k": st.integers(0, 60),
        "top_p": st.floats(0.01, 1),
        "min_p": st.floats(0, 1),
        "typical_p": st.floats(0.01, 1),
        "epsilon_cutoff": st.floats(0, 0.99),
        "eta_cutoff": st.floats(0, 0.99),
        "do_sample": st.booleans(),
        "seeds": st.integers(0, 2**64 - 1),
        "positions": st.integers(0, 2000),
        "renormalize": st.booleans(),
    }
)


@settings(max_examples=NUM_RUNS, deadline=None)
@given(
    parameters=st.lists(legal, min_size=1, max_size=5),
    seed=st.integers(0, 99),
    width=st.sampled_from([2, 50, 700]),
    scale=st.sampled_from([0.0, 1.0, 1e4]),
    order=st.randoms(use_true_random=False),
)
def test_7_2_any_legal_parameters_choose_an_id_within_the_width_whatever_the_order(
    parameters: list[dict[str, object]], seed: int, width: int, scale: float, order: object
) -> None:
    logits = torch.randn(len(parameters), width, generator=torch.Generator().manual_seed(seed)) * scale
    shuffled = list(range(len(parameters)))
    order.shuffle(shuffled)  # type: ignore[attr-defined]

    def chosen(samples: list[int]) -> list[tuple[int, float]]:
        values = {name: [parameters[sample][name] for sample in samples] for name in parameters[0]}
        made = choose(logits[samples].clone(), columns(len(samples), **values))
        return list(zip(made.token_ids_S.tolist(), made.logprobs_S.tolist(), strict=True))

    straight = chosen(list(range(len(parameters))))
    assert straight == chosen(list(range(len(parameters))))
    assert chosen(shuffled) == [straight[sample] for sample in shuffled]
    for token_id, logprob in straight:
        assert 0 <= token_id < width
        assert np.isfinite(logprob)
        assert logprob <= 1e-6


def test_a_row_with_a_draft_still_counts_as_decoding() -> None:
    group = SequenceGroup(request("a", 3, 5), 0.0, "")
    (sequence,) = group.sequences
    sequence.num_computed_tokens = 3
    sequence.append(7)
    assert ScheduledRow(group, sequence, 1, np.array([1, 2], dtype=np.int32)).is_decoding


def num_tokens_of_steps(run: Collector, executor: FakeExecutor) -> list[int]:
    """Runs to the end; how many tokens each step computed."""
    first = len(executor.plans)
    run.run()
    return [len(plan.token_ids_T) for plan in executor.plans[first:]]


def test_4_4_prompts_that_come_together_do_not_wait_for_the_first_of_them_to_end() -> None:
    executor = FakeExecutor(num_blocks=600, block_size=4, max_context=2000)
    run = Collector(EngineCore(executor, CoreLimits(token_budget=64, max_rows=32, step_cost_tokens=8)))
    run.submit(request("first", 64, 40))
    run.step()
    for n in range(14):
        run.submit(request(str(n), 32, 40))
    # Two prompts a step, or what streams leave of them; with 8 tokens beside a stream it would take 30 steps.
    assert num_tokens_of_steps(run, executor)[:7] == [64] * 7


def test_4_4_streams_wait_for_no_prompt_that_came_when_they_had_begun_nor_for_a_long_one() -> None:
    executor = FakeExecutor(num_blocks=600, block_size=4, max_context=2000)
    run = Collector(EngineCore(executor, CoreLimits(token_budget=64, max_rows=32, step_cost_tokens=8)))
    run.submit(request("stream", 8, 200))
    run.submit(request("long", 65, 2))  # which is more than a step has room for
    run.step()
    run.step()
    run.submit(request("late", 64, 2))
    # The step's cost of 8 tokens included, that is at most twice as long, with up to two streams.
    assert max(num_tokens_of_steps(run, executor)) <= 12
