"""Logits processors against transformers' and against their definitions."""

from __future__ import annotations

import numpy as np
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from gyrfalcon.runner.logits import process_logits
from gyrfalcon.testing.columns import columns

NO_LAST = np.zeros(3, dtype=np.int32)
WIDTH = 64


def random_logits(seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_neutral_values_leave_the_bits_alone() -> None:
    logits = random_logits()
    assert torch.equal(process_logits(logits.clone(), columns(3, history=[[1], [2], [3]]), NO_LAST), logits)


def test_repetition_penalty_is_that_of_transformers_once_an_id() -> None:
    logits, history = random_logits(), [[1, 5, 5, 63], [0, 2, 2, 2], []]
    made = columns(3, history=history, repetition_penalty=[1.3, 0.5, 1.0])
    processed = process_logits(logits.clone(), made, NO_LAST)
    for row, penalty in ((0, 1.3), (1, 0.5)):
        wanted = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([history[row]]), logits[row : row + 1].clone())
        torch.testing.assert_close(processed[row], wanted[0], rtol=1e-6, atol=0)
    assert torch.equal(processed[2], logits[2])


def test_frequency_penalty_subtracts_the_share_of_all_tokens() -> None:
    logits = random_logits()
    processed = process_logits(
        logits.clone(), columns(3, history=[[4, 4, 4, 9], [1], []], frequency_penalty=[2.0, -1.0, 0.0]), NO_LAST
    )
    wanted = logits.clone()
    wanted[0, 4] -= 2.0 * 3 / 4
    wanted[0, 9] -= 2.0 * 1 / 4
    wanted[1, 1] += 1.0
    torch.testing.assert_close(processed, wanted)


def test_banned_ids_cannot_be_chosen_and_temperature_divides() -> None:
    logits = random_logits()
    processed = process_logits(logits.clone(), columns(3, banned=[[3], [], [1, 2]], temperature=[1, 2, 1]), NO_LAST)
    assert processed[0, 3] == processed[2, 1] == processed[2, 2] == -torch.inf
    torch.testing.assert_close(processed[1].log_softmax(0), (logits[1] / 2).log_softmax(0))
    assert torch.isfinite(processed).sum() == 3 * WIDTH - 3


def test_a_watermark_adds_delta_to_a_green_list_of_the_key_and_the_last_token() -> None:
    def green(key: int, last_id: int, gamma: float = 0.5, width: int = 5000) -> torch.Tensor:
        made = columns(1, watermark_gamma=gamma, watermark_delta=2.0, watermark_key=key)
        return process_logits(torch.zeros(1, width), made, np.array([last_id], dtype=np.int32))[0] > 0

    base = green(15485863, 7)
    assert torch.equal(green(15485863, 7), base)
    assert torch.equal(green(15485863, 7, width=300), base[:300])
    for other in (green(15485863, 8), green(15485864, 7)):
        assert 0.45 < (other == base).double().mean() < 0.55  # independent lists agree on half of the ids
    for gamma in (0.25, 0.5, 0.9):
        share = green(1, 1, gamma).double().mean().item()
        assert abs(share - gamma) < 4 * (gamma * (1 - gamma) / 5000) ** 0.5


def test_a_watermark_touches_only_the_rows_that_ask_for_it() -> None:
    logits = random_logits()
    made = columns(3, watermark_gamma=[0, 0.5, 0], watermark_delta=[0, 2, 0])
    processed = process_logits(logits.clone(), made, NO_LAST)
    assert torch.equal(processed[[0, 2]], logits[[0, 2]])
    added = processed[1] - logits[1]
    assert {round(value, 4) for value in added.tolist()} == {0.0, 2.0}


def test_a_temperature_near_zero_leaves_the_likeliest_token() -> None:
    logits = random_logits()
    processed = process_logits(logits.clone(), columns(3, temperature=[1e-40, 1e-6, 1e30]), NO_LAST)
    probabilities = processed.softmax(dim=-1)
    assert probabilities[0].argmax() == logits[0].argmax()
    assert probabilities[:2].amax(dim=-1).tolist() == [1.0, 1.0]
    torch.testing.assert_close(probabilities[2], torch.full((WIDTH,), 1 / WIDTH))
