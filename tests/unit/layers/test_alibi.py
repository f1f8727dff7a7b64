"""ALiBi slopes."""

from __future__ import annotations

import pytest

from gyrfalcon.layers.alibi import alibi_slopes


def test_a_power_of_two_of_heads_has_one_geometric_sequence() -> None:
    assert alibi_slopes(8) == [2.0**-power for power in range(1, 9)]


def test_further_heads_take_every_second_slope_of_the_finer_sequence() -> None:
    slopes = alibi_slopes(6)

    assert slopes[:4] == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]
    assert slopes[4:] == pytest.approx([2.0**-1, 2.0**-3])


@pytest.mark.parametrize(("num_heads", "base"), [(32, 2**-0.25), (64, 2**-0.125)])
def test_the_published_models_have_their_base(num_heads: int, base: float) -> None:
    slopes = alibi_slopes(num_heads)

    assert len(slopes) == num_heads
    assert slopes[0] == pytest.approx(base)
    assert slopes[-1] == pytest.approx(2**-8)


def test_one_head_has_the_smallest_slope() -> None:
    assert alibi_slopes(1) == [2.0**-8]
