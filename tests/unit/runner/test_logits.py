"""Logits processors against transformers' and against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor
from transformers.generation import EncoderRepetitionPenaltyLogitsProcessor

from gyrfalcon.runner.logits import process_logits
from gyrfalcon.runner.sampler import choose
from gyrfalcon.splitmix import are_green
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


def test_biases_are_added_and_counted_choices_of_other_groups_subtracted() -> None:
    logits = random_logits()
    made = columns(
        3, bias=[{3: 1.5, 4: -2.0}, {}, {}], diversity=[{}, {5: 2, 6: 1}, {5: 2}], diversity_penalty=[9.0, 0.5, 0.0]
    )
    processed = process_logits(logits.clone(), made, NO_LAST)
    wanted = logits.clone()
    wanted[0, [3, 4]] += torch.tensor([1.5, -2.0])
    wanted[1, [5, 6]] -= torch.tensor([1.0, 0.5])
    assert torch.equal(processed, wanted)


def test_the_encoder_penalty_is_that_of_transformers_and_looks_at_the_prompt_alone() -> None:
    logits, history = random_logits(), [[1, 5, 5, 63], [7, 7, 8], []]
    made = columns(3, history=history, prompt_lens=[3, 2, 4], encoder_repetition_factor=[1 / 1.3, 1 / 0.5, 1.0])
    processed = process_logits(logits.clone(), made, NO_LAST)
    for row, penalty, prompt in ((0, 1.3, [1, 5, 5]), (1, 0.5, [7, 7])):
        oracle = EncoderRepetitionPenaltyLogitsProcessor(penalty, torch.tensor([prompt]))
        wanted = oracle(torch.tensor([history[row]]), logits[row : row + 1].clone())
        torch.testing.assert_close(processed[row], wanted[0], rtol=1e-6, atol=0)
    assert torch.equal(processed[2], logits[2])


def test_forced_ids_are_all_that_is_left_and_can_be_suppressed_after_all() -> None:
    logits = random_logits()
    logits[0, 9] = torch.nan
    made = columns(3, banned=[[4], [], []], forced=[[4], [], [8, 8, 6]], suppressed=[[], [], [6]])
    processed = process_logits(logits.clone(), made, NO_LAST)
    assert processed[0].isfinite().nonzero().tolist() == [[4]]
    assert processed[2].isfinite().nonzero().tolist() == [[8]]
    assert processed[0, 4] == processed[2, 8] == 0.0
    assert torch.equal(processed[1], logits[1])


def test_invalid_values_are_removed_where_asked_and_before_suppression() -> None:
    logits = random_logits()
    logits[:, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    made = columns(3, remove_invalid=[True, False, True], suppressed=[[], [], [0]], banned=[[5], [], []])
    processed = process_logits(logits.clone(), made, NO_LAST)
    largest = torch.finfo(torch.float32).max
    assert processed[0, :3].tolist() == [0.0, largest, -largest]
    assert processed[0, 5] == -largest
    assert processed[2, :3].tolist() == [-torch.inf, largest, -largest]
    assert torch.equal(processed[1, 1:], logits[1, 1:])
    assert processed[1, 0].isnan()


def test_the_end_is_hastened_from_what_is_left_of_invalid_values() -> None:
    logits = torch.tensor([[-torch.inf, torch.nan, 1.0, -2.0]])
    made = columns(1, remove_invalid=True, decaying=[[0, 1, 3]], decay=0.5)
    lowest = torch.finfo(torch.float32).min
    assert process_logits(logits, made, NO_LAST[:1]).tolist() == [[lowest / 2, 0.0, 1.0, -1.0]]


def test_everything_banned_is_reported_or_with_invalid_values_removed_a_draw_among_equals() -> None:
    made = columns(2, banned=[list(range(WIDTH))] * 2, remove_invalid=[False, True], seeds=[1, 2], temperature=0.5)
    chosen = choose(process_logits(random_logits()[:2].clone(), made, NO_LAST[:2]), made)
    assert chosen.token_ids_S[0] == -1
    assert 0 <= chosen.token_ids_S[1] < WIDTH
    assert chosen.logprobs_S[1].item() == pytest.approx(-math.log(WIDTH))


def test_stop_ids_gain_a_multiple_of_their_absolute_value_within_single_precision() -> None:
    logits = torch.tensor([[1.0, -2.0, 3.0, -torch.inf, 3e38, 5.0]])
    made = columns(1, decaying=[[0, 1, 1, 3, 4]], decay=[0.5])
    assert process_logits(logits.clone(), made, NO_LAST[:1]).tolist() == [
        [1.5, -1.0, 3.0, -math.inf, pytest.approx(torch.finfo(torch.float32).max), 5.0]
    ]
    steepest = columns(1, decaying=[[0, 1, 5]], decay=[np.finfo(np.float32).max], do_sample=False)
    chosen = choose(process_logits(logits[:, [0, 1, 2, 3, 2, 5]].clone(), steepest, NO_LAST[:1]), steepest)
    assert chosen.token_ids_S.item() in {0, 1, 5}


@pytest.mark.parametrize("size", [1e-38, 1e-3, 1e30, 3e38])
def test_hostile_magnitudes_of_one_row_leave_the_others_bits_alone(size: float) -> None:
    logits = random_logits()
    settings = {
        "history": [[1, 2, 3]] * 3,
        "prompt_lens": 2,
        "repetition_penalty": [1.2, size, 1.2],
        "encoder_repetition_factor": [1.1, 1 / size, 1.1],
        "frequency_penalty": [0.5, size, 0.5],
        "bias": [{3: 1.0}, {3: size}, {3: -1.0}],
        "decaying": [[5]] * 3,
        "decay": [0.5, size, 0.5],
        "temperature": [0.7, size, 0.7],
    }
    clean = {
        name: [value[0], value[0], value[2]] if isinstance(value, list) else value for name, value in settings.items()
    }
    logits[1] *= 1e30
    hostile = process_logits(logits.clone(), columns(3, **settings), NO_LAST)
    harmless = process_logits(logits.clone(), columns(3, **clean), NO_LAST)
    assert torch.equal(hostile[[0, 2]], harmless[[0, 2]])


def test_the_temperature_is_for_samples_that_draw() -> None:
    logits = random_logits()
    made = columns(3, do_sample=[False, True, False], temperature=0.5)
    processed = process_logits(logits.clone(), made, NO_LAST)
    assert torch.equal(processed[[0, 2]], logits[[0, 2]])
    assert torch.equal(processed[1], logits[1] / 0.5)


def test_columns_of_some_samples_are_what_those_samples_would_have_alone() -> None:
    logits = random_logits()
    made = columns(
        3,
        history=[[1, 2], [], [3, 3, 4]],
        prompt_lens=[1, 0, 2],
        repetition_penalty=[1.5, 1.0, 0.5],
        banned=[[], [7, 8], [9]],
        bias=[{1: 2.0}, {}, {2: 1.0, 5: -3.0}],
        temperature=[0.5, 1.0, 2.0],
    )
    together = process_logits(logits.clone(), made, NO_LAST)
    for samples in ([2, 0], [1], [0, 1, 2], []):
        some = made.take(np.array(samples, dtype=np.intp))
        assert torch.equal(process_logits(logits[samples].clone(), some, NO_LAST[: len(samples)]), together[samples])


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


def test_a_watermark_with_a_wider_context_follows_the_tokens_before_the_last() -> None:
    def green(context: list[list[int]]) -> torch.Tensor:
        made = columns(2, watermark_gamma=0.5, watermark_delta=2.0, watermark_key=9, watermark_context=context)
        return process_logits(torch.zeros(2, 3000), made, np.array([4, 4], dtype=np.int32)) > 0

    flags = green([[], [8, 9]])
    for row, context in ((0, [4]), (1, [4, 8, 9])):
        wanted = are_green(9, 0.5, np.tile(np.array(context), (3000, 1)), np.arange(3000))
        assert flags[row].tolist() == wanted.tolist()
