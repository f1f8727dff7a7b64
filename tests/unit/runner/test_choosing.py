"""From logits to a step's result: whose fault it is when nothing can be chosen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gyrfalcon.runner.choosing import RowLogits, choose_or_propose
from gyrfalcon.runner.interface import NOT_FINITE, NOTHING_LEFT
from gyrfalcon.testing.columns import columns


@pytest.mark.parametrize("num_candidates", [0, 4])
def test_a_model_that_fails_is_told_from_parameters_that_leave_nothing(num_candidates: int) -> None:
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    logits[1, 2] = torch.nan
    where = np.arange(3, dtype=np.int32)
    rows = RowLogits(where, where, logits, np.zeros(3, dtype=np.int32))
    made = columns(3, num_candidates=num_candidates, banned=[[], [], list(range(6))])
    codes = choose_or_propose(rows, made).token_ids_S.tolist()
    assert codes[0] >= 0
    assert codes[1:] == [NOT_FINITE, NOTHING_LEFT]
