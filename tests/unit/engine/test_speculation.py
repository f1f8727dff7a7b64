"""Speculation: what is drafted, when it is run, and that it changes nothing but the number of steps."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gyrfalcon.engine.core import CoreLimits, EngineCore, StepOutcome
from gyrfalcon.engine.interface import BeamParams, EngineRequest, FinishReason, SamplingParams
from gyrfalcon.engine.speculation import Drafter, NgramIndex, least_chance
from gyrfalcon.runner.interface import NOT_FINITE, NOTHING_LEFT, Ints, StepPlan, StepResult
from gyrfalcon.testing.collector import Collector
from gyrfalcon.testing.executor import FakeExecutor

PERIOD = (7, 8, 9, 4, 5)


def ids(*values: int) -> Ints:
    return np.array(values, dtype=np.int32)


def drafter(prompt: Ints) -> Drafter:
    return Drafter(NgramIndex(prompt))


def draft(subject: Drafter, text: Ints, most: int, least_chance: float) -> list[int]:
    length = min(most, subject.length_worth(text, least_chance))
    return subject.draft(text, length).tolist() if length else []


def slow_guess(text: list[int]) -> int | None:
    """What followed the text's last three tokens when they stood there last, else its last two."""
    for size in (3, 2):
        for place in range(len(text) - 1, size - 1, -1):
            if len(text) >= size and text[place - size : place] == text[-size:]:
                return text[place]
    return None


class TestDrafts:
    def test_what_followed_the_last_tokens_before_is_drafted(self) -> None:
        text = ids(1, 2, 3, 4, 5, 6, 1, 2, 3)
        assert draft(drafter(text), text, 3, 0.001) == [4, 5, 6]

    def test_three_equal_tokens_count_more_than_two_later_ones(self) -> None:
        text = ids(1, 2, 3, 4, 0, 2, 3, 5, 1, 2, 3)
        assert draft(drafter(text), text, 1, 0.1) == [4]

    def test_a_text_that_repeats_itself_is_drafted_beyond_its_end(self) -> None:
        text = ids(3, 1, 2, 1, 2)
        assert draft(drafter(text), text, 5, 0.0001) == [1, 2, 1, 2, 1]

    @pytest.mark.parametrize("text", [ids(5), ids(1, 2), ids(1, 2, 3, 4, 5, 6)])
    def test_a_text_without_repetition_has_no_draft(self, text: Ints) -> None:
        assert draft(drafter(text), text, 5, 0.0001) == []

    @given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 30))
    def test_every_draft_begins_as_a_slow_search_finds(self, text: list[int], num_prompt_tokens: int) -> None:
        num_prompt_tokens = min(num_prompt_tokens, len(text))
        subject = drafter(ids(*text[:num_prompt_tokens]))
        for length in range(num_prompt_tokens, len(text) + 1):
            found = draft(subject, ids(*text[:length]), 1, 1e-6)
            guess = slow_guess(text[:length])
            assert found == ([] if guess is None else [guess])

    def test_a_draft_grows_with_what_the_text_has_confirmed_and_ends_with_what_it_has_refuted(self) -> None:
        repeating = ids(*PERIOD * 6)
        subject = drafter(repeating[:10])
        lengths = [len(draft(subject, repeating[:length], 8, 0.1)) for length in range(10, 30)]
        assert lengths[0] == 1
        assert lengths == sorted(lengths)
        assert lengths[-1] == 8
        # The same pairs again and again, each time with another successor.
        varied = ids(*(token for last in range(10, 40) for token in (1, 2, last)))
        subject = drafter(varied[:6])
        assert [len(draft(subject, varied[:length], 8, 0.1)) for length in range(8, 90, 3)][-20:] == [0] * 20

    def test_drafting_pays_less_the_more_sequences_a_step_has(self) -> None:
        assert least_chance(1, 1, 16) < least_chance(8, 8, 16) < least_chance(64, 64, 16) < 1
        assert least_chance(8, 200, 16) < least_chance(8, 8, 16)  # beside a prompt's chunk it costs little

    def test_choices_of_a_request_share_the_prompts_index_and_nothing_else(self) -> None:
        prompt = ids(1, 2, 3)
        index = NgramIndex(prompt)
        one, other = Drafter(index), Drafter(index)
        assert draft(one, ids(1, 2, 3, 1, 2), 1, 0.1) == [3]
        draft(one, ids(1, 2, 3, 1, 2, 9, 1, 2), 1, 0.1)
        assert draft(other, ids(1, 2, 3, 1, 2), 1, 0.1) == [3]


class Parrot(FakeExecutor):
    """Continues every text with PERIOD, over and over: the next token is the one after the last."""

    def execute(self, plan: StepPlan) -> StepResult:
        result = super().execute(plan)
        ends = np.cumsum(plan.query_lens_R)
        last_ids = plan.token_ids_T[ends[plan.samples.rows_S] - 1 - plan.samples.tokens_back_S]
        after = dict(zip(PERIOD, (*PERIOD[1:], PERIOD[0]), strict=True))
        return dataclasses.replace(result, token_ids_S=ids(*(after.get(last, PERIOD[0]) for last in last_ids.tolist())))


def request(request_id: str, prompt_ids: tuple[int, ...], max_new_tokens: int, **others: object) -> EngineRequest:
    return EngineRequest(request_id=request_id, prompt_ids=prompt_ids, max_new_tokens=max_new_tokens, **others)


def parrot(executor: FakeExecutor | None = None, **limits: int) -> Collector:
    limits = {"token_budget": 64, "max_rows": 8, "max_draft_tokens": 4} | limits
    return Collector(EngineCore(executor or Parrot(num_blocks=200), CoreLimits(**limits)))


def repeated(num_tokens: int, start: int = 0) -> list[int]:
    return [PERIOD[(start + index) % len(PERIOD)] for index in range(num_tokens)]


class TestSteps:
    def test_a_repeating_text_takes_few_steps(self) -> None:
        run = parrot()
        run.submit(request("a", PERIOD * 2, 50))
        run.run()
        stats = run.core.stats()
        assert run.tokens["a"] == [repeated(50)]
        assert run.reasons["a"] == {0: FinishReason.LENGTH}
        assert stats.num_steps < 20
        assert stats.decode_tokens == 50
        assert stats.accepted_tokens == stats.draft_tokens == 50 - stats.num_steps

    def test_without_it_every_token_takes_a_step(self) -> None:
        run = parrot(max_draft_tokens=0)
        run.submit(request("a", PERIOD * 2, 50))
        run.run()
        assert (run.core.stats().num_steps, run.core.stats().draft_tokens) == (50, 0)

    @pytest.mark.parametrize("max_new_tokens", range(1, 15))
    def test_nothing_is_run_that_the_length_limit_forbids(self, max_new_tokens: int) -> None:
        executor = Parrot(num_blocks=200)
        run = parrot(executor, step_cost_tokens=1000)
        run.submit(request("a", PERIOD * 2, max_new_tokens))
        run.run()
        assert run.tokens["a"] == [repeated(max_new_tokens)]
        # Every token but the last drawn is run once: the last one never.
        assert sum(len(plan.token_ids_T) for plan in executor.plans) == len(PERIOD) * 2 + max_new_tokens - 1

    @pytest.mark.parametrize("stop", range(5))
    def test_a_stop_id_inside_an_accepted_draft_ends_the_choice(self, stop: int) -> None:
        run = parrot(step_cost_tokens=1000)
        prompt = PERIOD * 2 + tuple(repeated(stop + 2))
        ends_with = PERIOD[stop]
        run.submit(request("a", prompt, 50, stop_token_ids=(ends_with,)))
        run.run()
        assert run.tokens["a"] == [repeated(4, start=stop + 2)]
        assert run.reasons["a"] == {0: FinishReason.EOS}
        assert run.core.stats().cache_usage == 0

    def test_a_rejected_draft_leaves_no_blocks_behind(self) -> None:
        executor = FakeExecutor(num_blocks=200, block_size=2)
        run = parrot(executor, step_cost_tokens=10**6)
        prompt = (1, 1, 1, 1, 1, 1)
        run.submit(request("a", prompt, 30))
        without = Collector(EngineCore(FakeExecutor(num_blocks=200, block_size=2), CoreLimits(token_budget=64)))
        without.submit(request("a", prompt, 30))
        run.step()
        without.step()
        while run.core.has_work:
            run.step()
            while len(without.tokens["a"][0]) < len(run.tokens["a"][0]):
                without.step()
            assert run.core.stats().cache_usage == without.core.stats().cache_usage
        assert run.tokens == without.tokens

    def test_a_reading_tells_drafts_from_prompts(self) -> None:
        core = EngineCore(Parrot(num_blocks=200), CoreLimits(token_budget=64, max_rows=8, max_draft_tokens=4))
        readings = []
        for request_id in ("a", "b"):
            core.submit(request(request_id, PERIOD * 2, 8), StepOutcome())
        while core.has_work:
            outcome = StepOutcome()
            core.step(outcome)
            readings.append(outcome.step)
        assert [reading.num_prefill_tokens for reading in readings] == [10 + 10] + [0] * (len(readings) - 1)
        assert [len(reading.num_accepted_tokens) for reading in readings[:2]] == [0, 2]
        assert sum(sum(reading.num_accepted_tokens) for reading in readings) == core.stats().accepted_tokens > 0
        assert sum(reading.num_draft_tokens for reading in readings) == core.stats().draft_tokens

    def test_drafts_take_no_budget_from_prompts_and_other_rows(self) -> None:
        executor = Parrot(num_blocks=200)
        run = parrot(executor, token_budget=6, max_rows=4, step_cost_tokens=1000)
        run.submit(request("talks", PERIOD, 40))
        for _ in range(5):
            run.step()
        run.submit(request("long", tuple(range(20, 40)), 2))
        before = len(executor.plans)
        while "long" not in run.prompts:
            run.step()
        chunks = [max(plan.query_lens_R) for plan in executor.plans[before:]]
        assert chunks == [5, 5, 5, 5]
        assert all(len(plan.token_ids_T) == 6 for plan in executor.plans[before:])

    def test_rows_of_a_search_run_no_drafts(self) -> None:
        run = parrot(FakeExecutor(num_blocks=200), step_cost_tokens=1000)
        run.submit(request("a", (1,) * 9, 10, beams=BeamParams(num_beams=3), num_choices=2))
        run.run()
        assert run.core.stats().draft_tokens == 0

    def test_a_draft_is_written_to_a_copy_of_a_shared_block(self) -> None:
        run = parrot(step_cost_tokens=1000)
        prompt = PERIOD * 2 + (7,)
        sampling = SamplingParams(do_sample=True)
        run.submit(request("a", prompt, 20, num_choices=3, sampling=sampling))
        run.run()
        assert run.tokens["a"] == [repeated(20, start=1)] * 3
        assert run.core.stats().accepted_tokens > 20

    def test_ending_a_choice_between_steps_leaves_the_others(self) -> None:
        run = parrot(step_cost_tokens=1000)
        run.submit(request("a", PERIOD * 2, 30, num_choices=2, sampling=SamplingParams(do_sample=True)))
        for _ in range(3):
            run.step()
        run.end_choice("a", 0)
        run.run()
        assert run.tokens["a"][1] == repeated(30)
        assert len(run.tokens["a"][0]) < 30
        assert run.core.stats().cache_usage == 0


class Faulty(Parrot):
    """Fails the draw of the 21st token of a text."""

    code = NOT_FINITE

    def execute(self, plan: StepPlan) -> StepResult:
        result = super().execute(plan)
        result.token_ids_S[plan.samples.positions_S == 20] = self.code
        return result


class Ruled(Faulty):
    code = NOTHING_LEFT


@pytest.mark.parametrize("kind", [Faulty, Ruled])
def test_a_draw_that_fails_ends_the_request_after_the_tokens_before_it(kind: type[Faulty]) -> None:
    found = []
    for max_draft_tokens in (0, 8):
        run = parrot(kind(num_blocks=200), max_draft_tokens=max_draft_tokens, step_cost_tokens=1000)
        run.submit(request("a", PERIOD * 2, 30))
        run.run()
        found.append((run.tokens["a"], run.failures, run.core.stats().cache_usage))
    assert found[0] == found[1]
    assert found[0][0] == [repeated(10)]


def test_a_draw_that_fails_behind_a_rejected_token_is_nobodys_fault() -> None:
    class Late(FakeExecutor):
        def execute(self, plan: StepPlan) -> StepResult:
            result = super().execute(plan)
            result.token_ids_S[plan.samples.tokens_back_S < plan.query_lens_R[plan.samples.rows_S] - 1] = NOT_FINITE
            return result

    class Once(Late):
        """Prompts and lone tokens are sound; so is the first draw of a draft, which here never is the draft's."""

        def execute(self, plan: StepPlan) -> StepResult:
            return FakeExecutor.execute(self, plan) if plan.context_lens_R[0] == 0 else super().execute(plan)

    run = parrot(Once(num_blocks=200, vocab_size=1000), step_cost_tokens=10**6)
    run.submit(request("a", (1,) * 8, 40))
    run.run()
    assert not run.failures
    assert len(run.tokens["a"][0]) == 40


prompts = st.lists(st.integers(0, 1), min_size=1, max_size=14).map(tuple)


@st.composite
def requests(draw: st.DrawFn) -> EngineRequest:
    num_choices = draw(st.sampled_from([1, 1, 2, 3]))
    return request(
        str(draw(st.uuids())),
        draw(prompts),
        draw(st.integers(1, 16)),
        num_choices=num_choices,
        sampling=SamplingParams(
            do_sample=num_choices > 1 or draw(st.booleans()),
            seed=draw(st.integers(0, 3)),
            no_repeat_ngram_size=draw(st.sampled_from([0, 0, 4])),
            bad_words_ids=draw(st.sampled_from([(), ((0, 1),)])),
        ),
        stop_token_ids=tuple(draw(st.lists(st.integers(2, 5), max_size=2))),
        min_new_tokens=draw(st.sampled_from([0, 3])),
        prompt_logprobs=draw(st.booleans()),
        cache_salt=draw(st.sampled_from(["", "salt"])),
    )


@settings(max_examples=200, deadline=None)
@given(
    wanted=st.lists(requests(), min_size=1, max_size=6),
    num_spare_blocks=st.integers(0, 6),
    token_budget=st.integers(4, 12),
    vocab_size=st.sampled_from([2, 3, 6]),
    max_draft_tokens=st.integers(1, 8),
    arrivals=st.lists(st.integers(0, 4), min_size=6, max_size=6),
)
def test_every_request_is_told_what_it_is_told_without(
    wanted: list[EngineRequest],
    num_spare_blocks: int,
    token_budget: int,
    vocab_size: int,
    max_draft_tokens: int,
    arrivals: list[int],
) -> None:
    most_needed = max(one.num_choices * -(-(len(one.prompt_ids) + one.max_new_tokens) // 2) for one in wanted)
    found = []
    for most in (0, max_draft_tokens):
        executor = FakeExecutor(num_blocks=1 + most_needed + num_spare_blocks, block_size=2, vocab_size=vocab_size)
        limits = CoreLimits(token_budget=token_budget, max_rows=4, max_draft_tokens=most, step_cost_tokens=1000)
        run = Collector(EngineCore(executor, limits))
        for one, num_steps in zip(wanted, arrivals, strict=False):
            run.submit(one)
            for _ in range(num_steps):
                run.step()
        run.run()
        assert all(len(plan.token_ids_T) <= token_budget for plan in executor.plans)
        assert run.core.stats().cache_usage == 0
        found.append(run)
    without, with_drafts = found
    assert sorted(with_drafts.finished) == sorted(without.finished)
    assert set(with_drafts.failures) == set(without.failures)
    for one in wanted:
        name = one.request_id
        if name in without.failures and one.num_choices > 1:
            continue  # how far the others come before the one that fails is a matter of steps
        assert with_drafts.tokens[name] == without.tokens[name]
        assert with_drafts.logprobs[name] == without.logprobs[name]
        assert with_drafts.reasons[name] == without.reasons[name]
        assert with_drafts.failures.get(name) == without.failures.get(name)
        assert (name in with_drafts.prompts) == (name in without.prompts)
        if name in without.prompts:
            assert with_drafts.prompts[name].logprobs == without.prompts[name].logprobs
