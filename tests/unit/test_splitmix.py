"""The generator's numpy half against its torch half and against values written down."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gyrfalcon.runner import noise
from gyrfalcon.splitmix import are_green, draw_keys, green_threshold, uniform_bits, watermark_keys

KEYS = st.integers(0, 2**64 - 1)
IDS = st.integers(0, 2**31 - 1)


@given(st.lists(KEYS, min_size=1, max_size=20), IDS, st.lists(IDS, min_size=1, max_size=20))
def test_the_bits_are_those_that_the_device_computes(keys: list[int], last_id: int, ids: list[int]) -> None:
    last_ids = np.full(len(keys), last_id, dtype=np.int32)
    streams = watermark_keys(np.array(keys, dtype=np.uint64), last_ids)
    on_device = noise.uniform_bits(noise.as_tensor(streams, torch.device("cpu"))[:, None], torch.tensor(ids))
    ours = uniform_bits(streams[:, None], np.array(ids))
    assert ours.dtype == np.uint64
    assert ours.astype(np.int64).tolist() == on_device.tolist()


def test_the_first_outputs_of_key_zero_are_the_published_ones() -> None:
    bits = uniform_bits(np.zeros(1, dtype=np.uint64), np.arange(2))
    assert bits.tolist() == [0xE220A8397B1DCDAF >> 11, 0x6E789E6AA1B965F4 >> 11]


@pytest.mark.parametrize(
    ("key", "gamma", "last_id", "green"),
    [
        # Texts marked by one version must be found by the next: these never change.
        (15485863, 0.5, 0, "100011011010010010000111011101001100001000000011"),
        (0, 0.25, 65023, "000000000001000000000010010010101101001001100000"),
        (2**64 - 1, 0.9, 7, "011111101111111111101110011111111111110111111111"),
    ],
)
def test_green_lists_stay_as_they_are(key: int, gamma: float, last_id: int, green: str) -> None:
    found = are_green(key, gamma, np.full(48, last_id), np.arange(48))
    assert "".join("01"[int(flag)] for flag in found) == green


@given(KEYS, st.floats(2**-20, 1, exclude_max=True), IDS)
def test_a_token_is_green_as_the_plan_s_single_precision_decides(key: int, gamma: float, last_id: int) -> None:
    ids = np.arange(64)
    column = np.array([gamma], dtype=np.float32)
    threshold = (column.astype(np.float64) * 2**53).astype(np.int64)
    streams = watermark_keys(np.array([key], dtype=np.uint64), np.array([last_id]))
    bits = noise.uniform_bits(noise.as_tensor(streams, torch.device("cpu")), torch.from_numpy(ids))
    assert are_green(key, gamma, np.full(64, last_id), ids).tolist() == (bits.numpy() < threshold).tolist()


@pytest.mark.parametrize("gamma", [0.1, 0.25, 0.5, 0.9])
def test_a_share_of_gamma_is_green(gamma: float) -> None:
    share = are_green(99, gamma, np.arange(200_000) % 997, np.arange(200_000)).mean()
    assert abs(share - gamma) < 5 * (gamma * (1 - gamma) / 200_000) ** 0.5


def test_the_threshold_is_gamma_s_share_of_all_numbers() -> None:
    assert green_threshold(0.5) == 2**52
    assert green_threshold(0.25) == 2**51
    assert green_threshold(1e-50) == 0  # nothing is left of it in single precision


def test_draws_and_green_lists_of_equal_numbers_differ() -> None:
    numbers, positions = np.arange(50, dtype=np.uint64), np.arange(50)
    assert not set(draw_keys(numbers, positions).tolist()) & set(watermark_keys(numbers, positions).tolist())


def test_a_wider_context_changes_the_list_with_each_of_its_tokens_and_not_with_their_absence() -> None:
    ids = np.arange(4000)

    def green(*context: int) -> np.ndarray:
        return are_green(7, 0.5, np.tile(np.array(context), (len(ids), 1)), ids)

    assert (green(5) == are_green(7, 0.5, np.full(len(ids), 5), ids)).all()
    assert (green(5, -1, -1) == green(5)).all()
    assert (green(5, 6, -1) == green(5, 6)).all()
    for other in (green(5), green(5, 7), green(6, 5), green(5, 6, 8)):
        assert 0.45 < (green(5, 6) == other).mean() < 0.55  # independent lists agree on half of the ids
