"""Rotary frequencies and angles."""

from __future__ import annotations

import math

import pytest
import torch

from gyrfalcon.layers.rotary import frequencies, rotation, stretch_slow_frequencies

CPU = torch.device("cpu")


def test_frequencies_fall_from_one_towards_the_inverse_of_theta() -> None:
    expected = torch.tensor([1.0, 10000**-0.25, 10000**-0.5, 10000**-0.75])

    torch.testing.assert_close(frequencies(10000.0, 8, CPU), expected)


def test_both_halves_of_a_head_turn_by_the_same_angles() -> None:
    turn = rotation(torch.tensor([0, 3]), torch.tensor([1.0, 0.5]), torch.float32)

    torch.testing.assert_close(turn.cos_TE[0], torch.ones(4))
    torch.testing.assert_close(turn.sin_TE[1], torch.tensor([3.0, 1.5, 3.0, 1.5]).sin())


def test_angles_of_high_positions_are_exact_before_they_are_cast() -> None:
    turn = rotation(torch.tensor([2047]), torch.tensor([1.0]), torch.bfloat16)

    assert turn.cos_TE.dtype == torch.bfloat16
    assert turn.cos_TE[0, 0] == torch.tensor(math.cos(2047)).bfloat16()


def test_a_positions_angles_do_not_depend_on_the_rest_of_the_step() -> None:
    plain = frequencies(10000.0, 64, CPU)
    whole = rotation(torch.arange(100), plain, torch.float32)

    for position in (0, 1, 41, 99):
        alone = rotation(torch.tensor([position]), plain, torch.float32)
        assert torch.equal(alone.cos_TE[0], whole.cos_TE[position])
        assert torch.equal(alone.sin_TE[0], whole.sin_TE[position])


@pytest.mark.parametrize(
    ("turns", "share_kept"),
    [(0.5, 0.0), (1.0, 0.0), (2.5, 0.5), (4.0, 1.0), (100.0, 1.0)],
)
def test_slow_frequencies_are_stretched_fast_ones_kept_and_those_between_blended(
    turns: float, share_kept: float
) -> None:
    frequency = 2 * math.pi * turns / 8192

    stretched = stretch_slow_frequencies(
        torch.tensor([frequency]), factor=8.0, low_factor=1.0, high_factor=4.0, original_max_context=8192
    )

    expected = share_kept * frequency + (1 - share_kept) * frequency / 8
    assert stretched.item() == pytest.approx(expected, rel=1e-5)
