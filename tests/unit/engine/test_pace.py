"""How much may run beside what decodes: learnt from the time that steps take."""

from __future__ import annotations

import pytest

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
    assert 1.5 < slowdown < MOST_SLOWDOWN * 1.25
    assert 0.5 * step_cost < pace.num_tokens(0) < 1.5 * step_cost


def test_it_never_falls_below_what_it_began_with_nor_rises_above_the_budget() -> None:
    assert slowdown_after(1.0, 4)[0].num_tokens(4) == 8
    assert slowdown_after(10_000.0, 4)[0].num_tokens(0) == 512


def test_nothing_is_learnt_from_steps_that_did_not_need_the_allowance_or_had_nobody_waiting() -> None:
    pace = Pace(8, 512)
    pace.observe(1, 0, 1.0)
    for _ in range(50):
        pace.observe(1, 3, 1.0)
        pace.observe(0, 400, 1.0)
        pace.observe(1, 400, 0.0)
    assert pace.num_tokens(0) == 8


def test_it_begins_where_a_warm_up_has_measured_a_step_to_take_twice_as_long() -> None:
    pace = Pace(least_tokens=8, most_tokens=512)
    pace.begin(calm_s=0.08, token_s=0.002)
    assert pace.num_tokens(0) == 40
    pace.begin(calm_s=0.08, token_s=0.0)
    assert pace.num_tokens(0) == 512
    pace.begin(calm_s=0.001, token_s=0.01)
    assert pace.num_tokens(0) == 8


def test_streams_that_came_together_do_not_count_as_what_slows_them_down() -> None:
    """Their steps are longer than a lone stream's, although none of them was without a prompt yet."""
    pace, num_decoding, step_cost = Pace(8, 512), 32, 80.0
    pace.begin(calm_s=step_cost + 1.0, token_s=1.0)
    for _ in range(60):
        num_others = pace.num_tokens(num_decoding)
        pace.observe(num_decoding, num_others, step_cost + num_decoding + num_others)
    doubling = step_cost + num_decoding
    assert 0.75 * doubling < pace.num_tokens(num_decoding) < 1.1 * doubling


def test_a_calm_step_takes_longer_with_more_streams() -> None:
    pace = Pace(8, 512)
    assert pace.calm_s(4) is None
    pace.begin(calm_s=10.0, token_s=0.5)
    assert pace.calm_s(1) == 10.0
    assert pace.calm_s(21) == 20.0
