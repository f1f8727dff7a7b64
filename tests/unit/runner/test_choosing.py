"""From logits to a step's result: whose fault it is when nothing can be chosen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gyrfalcon.runner.choosing import RowLogits, choose_or_propose
from gyrfalcon.runner.interface import NOT_FINITE, NOTHING_LEFT
from gyrfalcon.testing.columns import columns


def no_greedy(logits_NV: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    raise AssertionError("no sample is plain")


def test_plain_samples_are_chosen_by_their_own_function_and_the_others_are_not() -> None:
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    last_tokens = np.arange(2, dtype=np.int32)
    rows = RowLogits(last_tokens, last_tokens, logits, np.zeros(2, dtype=np.int32))
    made = columns(2, do_sample=False, is_plain=[True, False])

    def choose_greedy(logits_NV: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        return np.array([5, 4], dtype=np.int32), np.array([-0.5, -0.25], dtype=np.float32)

    result = choose_or_propose(rows, made, choose_greedy)
    assert result.token_ids_S.tolist() == [5, int(logits[1].argmax())]
    assert result.logprobs_S[0] == -0.5
    assert result.logprobs_S[1] == pytest.approx(float(torch.log_softmax(logits[1], dim=0).max()))


@pytest.mark.parametrize("num_candidates", [0, 4])
def test_a_model_that_fails_is_told_from_parameters_that_leave_nothing(num_candidates: int) -> None:
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    logits[1, 2] = torch.nan
    where = np.arange(3, dtype=np.int32)
    rows = RowLogits(where, where, logits, np.zeros(3, dtype=np.int32))
    made = columns(3, num_candidates=num_candidates, banned=[[], [], list(range(6))])
    codes = choose_or_propose(rows, made, no_greedy).token_ids_S.tolist()
    assert codes[0] >= 0
    assert codes[1:] == [NOT_FINITE, NOTHING_LEFT]
