"""How much may run beside what decodes: learnt from the time that steps take."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gyrfalcon.engine.pace import MOST_SLOWDOWN, Pace


def slowdown_after(step_cost: float, num_decoding: int, num_steps: int = 60) -> tuple[Pace, float]:
    """Of a device whose steps cost `step_cost` tokens besides their own, after so many steps beside a long prompt."""
    pace, slowdown = Pace(8, 512), 0.0
    for _ in range(20):
        pace.observe(num_decoding, 0, step_cost + num_decoding)
    for _ in range(num_steps):
        num_others = pace.num_tokens(num_decoding)
        slowdown = (step_cost + num_decoding + num_others) / (step_cost + num_decoding)
        pace.observe(num_decoding, num_others, step_cost + num_decoding + num_others)
    return pace, slowdown


@pytest.mark.parametrize("num_decoding", [1, 8, 32])
@pytest.mark.parametrize("step_cost", [12.0, 50.0, 300.0])
def test_the_allowance_becomes_what_doubles_a_step(step_cost: float, num_decoding: int) -> None:
    pace, slowdown = slowdown_after(step_cost, num_decoding)
    assert 1.7 < slowdown <= MOST_SLOWDOWN
    doubling = step_cost + num_decoding
    assert 0.7 * doubling < pace.num_tokens(num_decoding) <= doubling


def test_it_never_falls_below_half_of_what_it_began_with_nor_rises_above_the_budget() -> None:
    assert slowdown_after(0.1, 1)[0].num_tokens(1) == 4
    assert slowdown_after(10_000.0, 4)[0].num_tokens(0) == 512


def test_nothing_is_learnt_from_steps_that_did_not_need_the_allowance_or_had_nobody_waiting() -> None:
    pace = Pace(8, 512)
    pace.observe(1, 0, 1.0)
    for _ in range(50):
        pace.observe(1, 3, 1.0)
        pace.observe(0, 400, 1.0)
        pace.observe(1, 400, 0.0)
    assert pace.num_tokens(0) == 8


def test_it_begins_where_a_warm_up_has_measured_a_step_to_take_nearly_twice_as_long() -> None:
    pace = Pace(first_tokens=8, most_tokens=512)
    pace.begin(calm_s=0.08, token_s=0.002)
    assert pace.num_tokens(0) == 32  # which make it 0.144 s: nearly twice
    pace.begin(calm_s=0.08, token_s=0.0)
    assert pace.num_tokens(0) == 512
    pace.begin(calm_s=0.001, token_s=0.01)
    assert pace.num_tokens(0) == 4


def test_streams_that_came_together_do_not_count_as_what_slows_them_down() -> None:
    """Their steps are longer than a lone stream's, although none of them was without a prompt yet."""
    pace, num_decoding, step_cost = Pace(8, 512), 32, 80.0
    pace.begin(calm_s=step_cost + 1.0, token_s=1.0)
    for _ in range(60):
        num_others = pace.num_tokens(num_decoding)
        pace.observe(num_decoding, num_others, step_cost + num_decoding + num_others)
    doubling = step_cost + num_decoding
    assert 0.7 * doubling < pace.num_tokens(num_decoding) <= doubling


def test_a_calm_step_takes_longer_with_more_streams() -> None:
    pace = Pace(8, 512)
    assert pace.calm_s(4) is None
    pace.begin(calm_s=10.0, token_s=0.5)
    assert pace.calm_s(1) == 10.0
    assert pace.calm_s(21) == 20.0


def test_steps_that_vary_bring_it_neither_up_nor_down() -> None:
    """Whatever else runs on the machine makes some steps longer and some shorter than their tokens would."""
    chance, pace, num_decoding, step_cost = random.Random(1), Pace(8, 512), 8, 100.0
    pace.begin(calm_s=step_cost + 1.0, token_s=1.0)
    slowdowns = []
    for _ in range(400):
        num_others = pace.num_tokens(num_decoding)
        step_s = (step_cost + num_decoding + num_others) * chance.choice([0.9, 1.0, 1.1])
        slowdowns.append(step_s / (step_cost + num_decoding))
        pace.observe(num_decoding, num_others, step_s)
    assert 1.6 < statistics.median(slowdowns[50:]) < MOST_SLOWDOWN


def test_it_falls_fast_where_a_step_takes_far_too_long_and_one_such_step_does_not_ruin_it() -> None:
    pace, num_decoding, step_cost = Pace(8, 512), 1, 20.0
    pace.begin(calm_s=step_cost + 1.0, token_s=0.05)
    assert pace.num_tokens(num_decoding) > 300
    for _ in range(12):
        num_others = pace.num_tokens(num_decoding)
        pace.observe(num_decoding, num_others, step_cost + 1 + num_others)
    assert pace.num_tokens(num_decoding) <= step_cost + 1
    settled = pace.num_tokens(num_decoding)
    pace.observe(num_decoding, settled, 100 * step_cost)
    assert pace.num_tokens(num_decoding) > settled / 2


def test_steps_with_more_in_them_than_is_allowed_teach_the_same() -> None:
    pace, num_decoding, step_cost = Pace(8, 512), 4, 60.0
    pace.begin(calm_s=step_cost + 1.0, token_s=1.0)
    for _ in range(60):
        pace.observe(num_decoding, 500, step_cost + num_decoding + 500)
    doubling = step_cost + num_decoding
    assert 0.7 * doubling < pace.num_tokens(num_decoding) <= doubling


@given(
    st.floats(1e-6, 10.0),
    st.floats(0.0, 10.0),
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 5000), st.floats(0.0, 100.0)), max_size=30),
)
def test_whatever_steps_took_both_answers_make_sense(
    calm_s: float, token_s: float, steps: list[tuple[int, int, float]]
) -> None:
    pace = Pace(8, 512)
    pace.begin(calm_s, token_s)
    for num_decoding, num_others, step_s in steps:
        pace.observe(num_decoding, num_others, step_s)
        for number in (1, 7, 300):
            found_s = pace.calm_s(number)
            assert found_s is not None
            assert 0 < found_s < float("inf")
            assert 4 <= pace.num_tokens(number) <= 512 + number
