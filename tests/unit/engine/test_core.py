"""The core over a cache of token ids: whatever the scheduler does, every request gets the tokens it would get alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gyrfalcon.engine.core import CoreLimits, EngineCore
from gyrfalcon.engine.interface import BeamParams, EarlyStopping, EngineRequest, FinishReason, SamplingParams
from gyrfalcon.errors import OutOfCache
from gyrfalcon.runner.interface import (
    NOT_FINITE,
    NOTHING_LEFT,
    ProposedTokens,
    SamplingColumns,
    StepPlan,
    StepResult,
)
from gyrfalcon.testing.collector import Collector
from gyrfalcon.testing.executor import FakeExecutor, fake_continuation

SAMPLED = SamplingParams(do_sample=True, seed=11)


def request(request_id: str, prompt_ids: tuple[int, ...], max_new_tokens: int = 5, **others: object) -> EngineRequest:
    return EngineRequest(request_id=request_id, prompt_ids=prompt_ids, max_new_tokens=max_new_tokens, **others)


def expected(wanted: EngineRequest) -> list[list[int]]:
    """The tokens of every choice of a request, stop ids and all, without an engine."""
    choices = []
    for choice in range(wanted.num_choices):
        seed = wanted.sampling.seed + choice if wanted.sampling.do_sample else 0
        tokens = fake_continuation(wanted.prompt_ids, wanted.max_new_tokens, seed)
        ends = [index for index, token in enumerate(tokens) if token in wanted.stop_token_ids]
        choices.append(tokens[: ends[0] + 1] if ends else tokens)
    return choices


def make_core(executor: FakeExecutor | None = None, **limits: int | bool) -> EngineCore:
    return EngineCore(executor or FakeExecutor(), CoreLimits(**{"token_budget": 16, "max_rows": 8, **limits}))


def test_a_request_gets_its_continuation_and_ends_by_length() -> None:
    run = Collector(make_core())
    wanted = request("a", (1, 2, 3, 4, 5), 7)
    run.submit(wanted)
    run.run()
    assert run.tokens["a"] == expected(wanted)
    assert run.reasons["a"] == {0: FinishReason.LENGTH}
    assert run.finished == ["a"]


def test_a_stop_id_ends_a_choice_and_is_its_last_token() -> None:
    free = fake_continuation((1, 2, 3), 9)
    wanted = request("a", (1, 2, 3), 9, stop_token_ids=(free[3],))
    run = Collector(make_core())
    run.submit(wanted)
    run.run()
    assert run.tokens["a"] == [free[:4]]
    assert run.reasons["a"] == {0: FinishReason.EOS}


def test_the_length_limit_is_reported_before_a_stop_id_on_the_same_token() -> None:
    free = fake_continuation((1, 2, 3), 4)
    run = Collector(make_core())
    run.submit(request("a", (1, 2, 3), 4, stop_token_ids=(free[3],)))
    run.run()
    assert run.reasons["a"] == {0: FinishReason.LENGTH}


def ready_core(executor: FakeExecutor, **limits: int | bool) -> EngineCore:
    """A core that has measured a step: the fake's are so short that many fit into AHEAD_S."""
    core = make_core(executor, **limits)
    core.warm_up()
    executor.plans.clear()
    return core


def test_short_greedy_steps_run_several_at_once() -> None:
    executor = FakeExecutor(can_run_ahead=True)
    run = Collector(ready_core(executor))
    wanted = [request("a", (1, 2, 3), 20), request("b", (4, 5), 20)]
    for one in wanted:
        run.submit(one)
    run.run()
    assert [run.tokens[one.request_id] for one in wanted] == [expected(one) for one in wanted]
    # The prompts' step draws the first of 20 tokens; 8 at once follow as long as so many may still come.
    assert [plan.num_ahead for plan in executor.plans] == [0, 7, 7, 2]
    assert run.core.stats().cache_usage == 0.0
    assert run.core.stats().decode_tokens == 40
    assert run.core.stats().num_steps == 20


def test_a_step_without_decoding_runs_whatever_a_token_takes() -> None:
    executor = FakeExecutor(can_run_ahead=True)
    run = Collector(ready_core(executor))
    # One token takes longer than a whole step was seen to take: without any, less than nothing would be left.
    run.core._scheduler.pace.begin(calm_s=0.001, token_s=0.01)
    one = request("a", (1, 2, 3), 5)
    run.submit(one)
    run.run()
    assert run.tokens["a"] == expected(one)


@pytest.mark.parametrize(
    "others", [{"sampling": SAMPLED}, {"top_n": 2}, {"min_new_tokens": 3}, {"beams": BeamParams(num_beams=2)}]
)
def test_who_asks_for_more_than_the_likeliest_token_keeps_all_from_running_ahead(others: dict[str, object]) -> None:
    executor = FakeExecutor(can_run_ahead=True, num_blocks=100)
    run = Collector(ready_core(executor))
    run.submit(request("plain", (1, 2, 3), 12))
    run.submit(request("other", (4, 5), 12, **others))
    run.run()
    assert run.tokens["plain"] == expected(request("plain", (1, 2, 3), 12))
    assert all(plan.num_ahead == 0 for plan in executor.plans if len(plan.query_lens_R) > 1)


def test_nothing_runs_ahead_where_steps_are_long_or_the_executor_cannot() -> None:
    now_s = iter(np.arange(10_000) * 0.0015)
    slow = EngineCore(FakeExecutor(can_run_ahead=True), CoreLimits(token_budget=16), clock=lambda: float(next(now_s)))
    slow.warm_up()
    for core in (slow, ready_core(FakeExecutor())):
        run = Collector(core)
        run.submit(request("a", (1, 2, 3), 9))
        run.step()
        run.step()
        assert len(run.tokens["a"][0]) == 2


def test_a_stop_id_among_the_tokens_run_ahead_ends_the_choice_there() -> None:
    free = fake_continuation((1, 2, 3), 9)
    run = Collector(ready_core(FakeExecutor(can_run_ahead=True)))
    run.submit(request("a", (1, 2, 3), 9, stop_token_ids=(free[4],)))
    run.submit(request("b", (7,), 9))
    run.run()
    assert run.tokens == {"a": [free[:5]], "b": [fake_continuation((7,), 9)]}
    assert run.reasons["a"] == {0: FinishReason.EOS}
    assert run.core.stats().cache_usage == 0.0


def test_a_step_that_fails_ahead_is_done_again_request_by_request() -> None:
    num_failures = iter([True])

    def fail_once(plan: StepPlan) -> None:
        if plan.num_ahead and next(num_failures, False):
            raise RuntimeError("the device is gone")

    run = Collector(ready_core(FakeExecutor(can_run_ahead=True, before_step=fail_once)))
    wanted = [request("a", (1, 2, 3), 20), request("b", (4, 5), 20)]
    for one in wanted:
        run.submit(one)
    run.run()
    assert not run.failures
    assert [run.tokens[one.request_id] for one in wanted] == [expected(one) for one in wanted]


def test_choices_share_the_prompt_and_copy_only_the_block_they_write() -> None:
    executor = FakeExecutor(block_size=4)
    run = Collector(make_core(executor))
    wanted = request("a", tuple(range(10)), 6, num_choices=3, sampling=SAMPLED)
    run.submit(wanted)
    run.run()
    assert run.tokens["a"] == expected(wanted)
    assert sum(len(plan.token_ids_T) for plan in executor.plans) == 10 + 3 * 5
    assert sum(len(plan.block_copies_C2) for plan in executor.plans) == 2


def test_a_second_request_reuses_the_prefix_but_not_across_salts() -> None:
    run = Collector(make_core())
    prompt = tuple(range(12))
    for request_id, salt in (("first", ""), ("same", ""), ("other", "tenant")):
        run.submit(request(request_id, prompt, 2, cache_salt=salt))
        run.run()
    assert run.prompts["first"].num_cached_tokens == 0
    assert run.prompts["same"].num_cached_tokens == 8
    assert run.prompts["other"].num_cached_tokens == 0
    assert run.tokens["same"] == run.tokens["first"] == run.tokens["other"]


def test_without_prefix_caching_nothing_is_reused() -> None:
    run = Collector(make_core(prefix_caching=False))
    for request_id in ("first", "second"):
        run.submit(request(request_id, tuple(range(12)), 2))
        run.run()
    assert run.prompts["second"].num_cached_tokens == 0


@pytest.mark.parametrize("budget", [3, 5, 64])
def test_prompt_scores_cover_the_prompt_whatever_the_chunks(budget: int) -> None:
    run = Collector(make_core(token_budget=budget, max_rows=3))
    prompt = (5, 9, 3, 3, 8, 1, 2, 40, 7, 7, 6)
    for request_id in ("warm", "scored"):
        run.submit(request(request_id, prompt, 3, prompt_logprobs=request_id == "scored"))
        run.run()
    assert run.prompts["scored"].logprobs == (None, *(-token / 8 for token in prompt[1:]))
    assert run.prompts["scored"].num_cached_tokens == 0


def test_an_ended_choice_stops_and_its_siblings_go_on() -> None:
    run = Collector(make_core())
    wanted = request("a", (1, 2, 3), 8, num_choices=2, sampling=SAMPLED)
    run.submit(wanted)
    run.step()
    run.step()
    run.end_choice("a", 0)
    run.run()
    assert run.tokens["a"] == [expected(wanted)[0][:2], expected(wanted)[1]]
    assert run.finished == ["a"]


def test_a_failing_step_ends_its_requests_only() -> None:
    def fail_on_marked(plan: StepPlan) -> None:
        if 66 in plan.token_ids_T:
            raise RuntimeError("device error")

    run = Collector(make_core(FakeExecutor(before_step=fail_on_marked), token_budget=4, max_rows=2))
    run.submit(request("bad", (66, 1, 2, 3)))
    run.run()
    good = request("good", (1, 2, 3))
    run.submit(good)
    run.run()
    assert list(run.failures) == ["bad"]
    assert run.tokens["good"] == expected(good)


def test_what_can_never_fit_is_refused_at_once() -> None:
    run = Collector(make_core(FakeExecutor(num_blocks=5, block_size=4)))
    run.submit(request("long", (1,) * 10, 7))
    run.submit(request("wide", (1,) * 8, 8, num_choices=3, sampling=SAMPLED))
    assert sorted(run.failures) == ["long", "wide"]
    assert not run.core.has_work


def test_a_promise_beyond_the_cache_is_refused_at_start() -> None:
    with pytest.raises(OutOfCache, match="16 tokens.*promises 17"):
        make_core(FakeExecutor(num_blocks=5, block_size=4), max_total_tokens=17)


def test_preempted_requests_resume_with_the_same_tokens_and_the_oldest_is_never_preempted() -> None:
    executor = FakeExecutor(num_blocks=9, block_size=2)
    core = make_core(executor, token_budget=8, max_rows=4)
    run = Collector(core)
    wanted = [
        request(str(seed), (seed, 1), 12, sampling=SamplingParams(do_sample=True, seed=seed)) for seed in range(3)
    ]
    for one in wanted:
        run.submit(one)
    run.run()
    assert core.stats().num_preemptions > 0
    assert run.finished[0] == "0"
    for one in wanted:
        assert run.tokens[one.request_id] == expected(one)


def test_a_prompt_preempted_while_it_is_scored_is_scored_once() -> None:
    core = make_core(FakeExecutor(num_blocks=11, block_size=2), token_budget=4, max_rows=4)
    run = Collector(core)
    run.submit(request("older", (1, 2), 16))
    run.step()
    prompt = tuple(range(20, 34))
    run.submit(request("scored", prompt, 2, prompt_logprobs=True))
    run.run()
    assert core.stats().num_preemptions > 0
    assert run.prompts["scored"].logprobs == (None, *(-token / 8 for token in prompt[1:]))


def test_a_forked_request_as_large_as_the_cache_finishes() -> None:
    executor = FakeExecutor(num_blocks=18, block_size=2)
    core = make_core(executor, token_budget=8, max_rows=8)
    run = Collector(core)
    large = request("large", (1, 2, 3, 4), 10, num_choices=3, sampling=SAMPLED)
    small = request("small", (7,), 14)
    for one in (small, large):
        run.submit(one)
    run.run()
    assert core.stats().num_preemptions > 0
    assert run.tokens == {"small": expected(small), "large": expected(large)}


prompts = st.lists(st.integers(0, 3), min_size=1, max_size=14).map(tuple)


@st.composite
def requests(draw: st.DrawFn) -> EngineRequest:
    return request(
        str(draw(st.uuids())),
        draw(prompts),
        draw(st.integers(1, 12)),
        num_choices=draw(st.sampled_from([1, 1, 2, 3])),
        sampling=SamplingParams(do_sample=draw(st.booleans()), seed=draw(st.integers(0, 3))),
        stop_token_ids=tuple(draw(st.lists(st.integers(0, 99), max_size=4))),
        prompt_logprobs=draw(st.booleans()),
        cache_salt=draw(st.sampled_from(["", "salt"])),
    )


@settings(max_examples=150, deadline=None)
@given(
    wanted=st.lists(requests(), min_size=1, max_size=7),
    num_spare_blocks=st.integers(0, 6),
    token_budget=st.integers(4, 9),
    prefix_caching=st.booleans(),
    runs_ahead=st.booleans(),
)
def test_every_request_gets_its_own_tokens_however_short_the_cache(
    wanted: list[EngineRequest], num_spare_blocks: int, token_budget: int, prefix_caching: bool, runs_ahead: bool
) -> None:
    most_needed = max(one.num_choices * -(-(len(one.prompt_ids) + one.max_new_tokens) // 2) for one in wanted)
    num_blocks = 1 + most_needed + num_spare_blocks
    executor = FakeExecutor(num_blocks=num_blocks, block_size=2, can_run_ahead=runs_ahead)
    core = ready_core(executor, token_budget=token_budget, max_rows=4, prefix_caching=prefix_caching)
    run = Collector(core)
    for one in wanted:
        run.submit(one)
    run.run()
    assert not run.failures
    for one in wanted:
        assert run.tokens[one.request_id] == expected(one)
        if one.prompt_logprobs:
            assert run.prompts[one.request_id].logprobs == (None, *(-token / 8 for token in one.prompt_ids[1:]))
    assert all(len(plan.token_ids_T) <= token_budget for plan in executor.plans)
    assert all(len(plan.query_lens_R) <= 4 for plan in executor.plans)
    assert core.stats().cache_usage == 0.0


@st.composite
def beam_requests(draw: st.DrawFn) -> EngineRequest:
    groups, width = draw(st.sampled_from([(1, 2), (1, 3), (2, 1), (2, 2)]))
    return request(
        str(draw(st.uuids())),
        draw(prompts),
        draw(st.integers(1, 12)),
        num_choices=draw(st.integers(1, groups * width)),
        stop_token_ids=tuple(draw(st.lists(st.integers(0, 99), max_size=3, unique=True))),
        beams=BeamParams(
            num_beams=groups * width,
            num_beam_groups=groups,
            early_stopping=draw(st.sampled_from(EarlyStopping)),
            length_penalty=draw(st.sampled_from([-1.0, 0.0, 1.0])),
        ),
    )


@settings(max_examples=100, deadline=None)
@given(
    wanted=st.lists(st.one_of(beam_requests(), requests()), min_size=2, max_size=6),
    num_spare_blocks=st.integers(0, 6),
    token_budget=st.integers(4, 9),
)
def test_searches_in_a_short_cache_find_what_they_find_alone(
    wanted: list[EngineRequest], num_spare_blocks: int, token_budget: int
) -> None:
    def rows_of(one: EngineRequest) -> int:
        return one.beams.num_beams if one.beams else one.num_choices

    most_needed = max(rows_of(one) * -(-(len(one.prompt_ids) + one.max_new_tokens) // 2) for one in wanted)
    executor = FakeExecutor(num_blocks=1 + most_needed + num_spare_blocks, block_size=2)
    together = Collector(make_core(executor, token_budget=token_budget, max_rows=4))
    for one in wanted:
        together.submit(one)
    together.run()
    assert not together.failures
    assert together.core.stats().cache_usage == 0.0
    for one in wanted:
        alone = Collector(make_core(FakeExecutor(num_blocks=400, block_size=2)))
        alone.submit(one)
        alone.run()
        assert together.tokens[one.request_id] == alone.tokens[one.request_id]
        assert together.scores.get(one.request_id) == alone.scores.get(one.request_id)


def test_the_tokens_promised_to_a_search_are_those_of_all_its_beams() -> None:
    run = Collector(make_core())
    run.submit(request("beams", (1, 2, 3), 5, beams=BeamParams(num_beams=4)))
    run.step()
    assert run.core.stats().num_promised_tokens == 4 * (3 + 5)


def test_preempted_searches_resume_with_the_same_result() -> None:
    searches = [request(str(i), (i, 2, 3), 20, beams=BeamParams(num_beams=4)) for i in range(4)]
    core = make_core(FakeExecutor(num_blocks=47, block_size=2), token_budget=20, max_rows=20)
    together = Collector(core)
    together.submit(request("older", (7,), 80))
    for one in searches:
        together.submit(one)
    together.run()
    assert core.stats().num_preemptions > 0
    for one in searches:
        alone = Collector(make_core(FakeExecutor(num_blocks=400, block_size=2)))
        alone.submit(one)
        alone.run()
        assert together.tokens[one.request_id] == alone.tokens[one.request_id]


class FailingChoice(FakeExecutor):
    """Fails in the second wave of every diverse search: by a code in place of a token, or by an error."""

    def __init__(self, code: int | None) -> None:
        super().__init__()
        self._code = code
        self._in_execute = False

    def execute(self, plan: StepPlan) -> StepResult:
        self._in_execute = True
        return super().execute(plan)

    def choose(self, samples: SamplingColumns) -> StepResult:
        result = super().choose(samples)
        if self._in_execute:
            self._in_execute = False
            return result
        if self._code is None:
            raise RuntimeError("device error")
        return dataclasses.replace(
            result,
            token_ids_S=np.full(len(result.token_ids_S), self._code, dtype=np.int32),
            proposed=ProposedTokens.none(len(result.token_ids_S)),
        )


@pytest.mark.parametrize("code", [NOT_FINITE, NOTHING_LEFT, None])
def test_a_search_that_fails_in_a_later_wave_ends_alone(code: int | None) -> None:
    run = Collector(make_core(FailingChoice(code)))
    neighbour = request("neighbour", (5, 6), 6)
    for one in (request("diverse", (1, 2), 6, beams=BeamParams(num_beams=4, num_beam_groups=2)), neighbour):
        run.submit(one)
    run.run()
    assert list(run.failures) == ["diverse"]
    assert run.tokens["neighbour"] == expected(neighbour)
    assert run.core.stats().cache_usage == 0.0


class CoreMachine(RuleBasedStateMachine):
    """Submit, step, abort and end choices in any order, in a cache too small for all."""

    def __init__(self) -> None:
        super().__init__()
        self.run = Collector(make_core(FakeExecutor(num_blocks=41, block_size=2), token_budget=6, max_rows=6))
        self.wanted: dict[str, EngineRequest] = {}
        self.live: set[str] = set()
        self.cut: dict[str, set[int]] = {}  # choices ended from outside

    @rule(wanted=requests())
    def submit(self, wanted: EngineRequest) -> None:
        self.run.submit(wanted)
        self.wanted[wanted.request_id] = wanted
        self.cut[wanted.request_id] = set()
        self.live.add(wanted.request_id)

    @rule()
    def step(self) -> None:
        self.run.step()
        self.live -= set(self.run.finished)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.live)))
        self.run.core.abort(request_id)
        self.live.remove(request_id)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end_choice(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.live)))
        choice = data.draw(st.integers(0, self.wanted[request_id].num_choices - 1))
        self.run.end_choice(request_id, choice)
        self.cut[request_id].add(choice)
        if len(self.cut[request_id] | self.run.reasons[request_id].keys()) == self.wanted[request_id].num_choices:
            self.live.remove(request_id)

    @invariant()
    def tokens_so_far_are_those_of_the_request_alone(self) -> None:
        for request_id, choices in self.run.tokens.items():
            for told, whole in zip(choices, expected(self.wanted[request_id]), strict=True):
                assert told == whole[: len(told)]

    def teardown(self) -> None:
        self.run.run()
        for request_id in self.live:
            for choice, whole in enumerate(expected(self.wanted[request_id])):
                if choice not in self.cut[request_id]:
                    assert self.run.tokens[request_id][choice] == whole
        assert not self.run.failures
        assert self.run.core.stats().cache_usage == 0.0
        assert self.run.core.stats().num_waiting == self.run.core.stats().num_running == 0


TestCoreInAnyOrder = CoreMachine.TestCase
TestCoreInAnyOrder.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
