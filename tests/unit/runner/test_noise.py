"""The counter-based generator against SplitMix64 written out in Python integers."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from gyrfalcon.runner.noise import as_tensor, draw_keys, gumbel, uniform_bits, watermark_keys

MASK = 2**64 - 1


def output(state: int) -> int:
    z = state & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


@given(st.integers(0, MASK), st.integers(0, 2**31 - 1), st.integers(0, 200_000))
def test_bits_are_those_of_splitmix64_for_any_seed_position_and_id(seed: int, position: int, token_id: int) -> None:
    keys = draw_keys(np.array([seed], dtype=np.uint64), np.array([position], dtype=np.int32))
    key = output(output(seed) + position * 0x9E3779B97F4A7C15)
    assert int(keys[0]) == key
    bits = uniform_bits(as_tensor(keys, torch.device("cpu")), torch.tensor([token_id]))
    assert bits.item() == output(key + (token_id + 1) * 0x9E3779B97F4A7C15) >> 11


def test_the_first_outputs_of_seed_zero_are_the_published_ones() -> None:
    # SplitMix64 seeded with 0 starts 0xe220a8397b1dcdaf, 0x6e789e6aa1b965f4, ...
    bits = uniform_bits(torch.zeros(1, dtype=torch.int64), torch.arange(2))
    assert bits.tolist() == [0xE220A8397B1DCDAF >> 11, 0x6E789E6AA1B965F4 >> 11]


def test_gumbel_noise_is_finite_and_has_its_mean_and_variance() -> None:
    keys = as_tensor(draw_keys(np.arange(100, dtype=np.uint64), np.zeros(100, dtype=np.int32)), torch.device("cpu"))
    noise = gumbel(keys[:, None], torch.arange(1000))
    assert torch.isfinite(noise).all()
    assert abs(noise.mean().item() - 0.5772) < 0.02
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.03


def test_a_watermark_key_and_an_equal_seed_have_different_streams() -> None:
    numbers, positions = np.arange(50, dtype=np.uint64), np.arange(50, dtype=np.int32)
    assert not set(draw_keys(numbers, positions).tolist()) & set(watermark_keys(numbers, positions).tolist())
