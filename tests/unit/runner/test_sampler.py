"""The sampler against transformers' warpers, and the properties every draw must have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from gyrfalcon.runner.logits import process_logits
from gyrfalcon.runner.sampler import BLOCK_ELEMENTS, NARROW_WIDTHS, choose, warped_groups
from gyrfalcon.testing.columns import columns

NARROW_WIDTH = NARROW_WIDTHS[0]
WIDE = 3 * NARROW_WIDTH
VERY_WIDE = 2 * NARROW_WIDTHS[1]


def random_logits(seed: int, num_samples: int, width: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(num_samples, width, generator=torch.Generator().manual_seed(seed))


def reference(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, typical_p: float) -> torch.Tensor:
    """Log-probabilities of one row after transformers' warpers, in TGI's order."""
    scores, ids = logits[None].clone(), torch.zeros(1, 1, dtype=torch.long)
    if temperature != 1.0:
        scores = TemperatureLogitsWarper(temperature)(ids, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1.0:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    if typical_p < 1.0:
        scores = TypicalLogitsWarper(typical_p)(ids, scores)
    return torch.log_softmax(scores[0], dim=-1)


@pytest.mark.parametrize("width", [50, WIDE])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 10, 256, 300])
@pytest.mark.parametrize("top_p", [0.05, 0.9, 1.0])
@pytest.mark.parametrize("typical_p", [0.2, 0.95, 1.0])
def test_what_survives_and_its_probabilities_are_those_of_transformers(
    width: int, temperature: float, top_k: int, top_p: float, typical_p: float
) -> None:
    logits = random_logits(1, 4, width)
    made = columns(4, temperature=temperature, top_k=top_k, top_p=top_p, typical_p=typical_p, top_n=width)
    chosen = choose(process_logits(logits.clone(), made, np.zeros(4, dtype=np.int32)), made)
    for row in range(4):
        wanted = reference(logits[row], temperature, min(top_k, width), top_p, typical_p)
        listed = chosen.top[row]
        assert listed is not None
        assert sorted(listed[0].tolist()) == torch.isfinite(wanted).nonzero().flatten().tolist()
        torch.testing.assert_close(listed[1], wanted[listed[0]], rtol=0, atol=2e-5)
        assert chosen.logprobs_S[row] == pytest.approx(wanted[chosen.token_ids_S[row]].item(), abs=2e-5)


def test_ties_with_the_kth_logit_survive_however_many() -> None:
    for ties in (3, *(width + 5 for width in NARROW_WIDTHS)):
        logits = torch.full((1, VERY_WIDE), -1.0)
        logits[0, :ties] = 2.0
        chosen = choose(logits, columns(1, top_k=2, top_n=VERY_WIDE))
        assert chosen.top[0] is not None
        assert chosen.top[0][0].tolist() == list(range(ties))


def test_greedy_takes_the_lowest_id_of_a_tie_and_ignores_seeds() -> None:
    logits = torch.zeros(3, 400)
    logits[:, [7, 300]] = 5.0
    chosen = choose(logits, columns(3, do_sample=False, seeds=[1, 2, 3]))
    assert chosen.token_ids_S.tolist() == [7, 7, 7]


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.1, 0.025])
    draws = 20_000
    chosen = choose(probabilities.log().expand(draws, -1), columns(draws, seeds=3, positions=np.arange(draws)))
    counts = torch.bincount(chosen.token_ids_S, minlength=5)
    chi_square = ((counts - draws * probabilities) ** 2 / (draws * probabilities)).sum().item()
    assert chi_square < 18.5  # the 0.999 quantile for 4 degrees of freedom


@pytest.mark.parametrize(
    "warped",
    [
        {},
        *(
            {name: value}
            for name, value in (
                ("top_k", 20),
                ("top_p", 0.9),
                ("typical_p", 0.9),
                ("min_p", 0.05),
                ("eta_cutoff", 0.01),
            )
        ),
    ],
)
def test_a_draw_depends_on_its_own_row_seed_and_position_only(warped: dict[str, float]) -> None:
    logits = random_logits(2, 12, WIDE)
    seeds, positions = np.arange(12) * 7, np.arange(12) + 5
    together = choose(logits.clone(), columns(12, seeds=seeds, positions=positions, **warped))
    for row in range(12):
        mixed = torch.cat([random_logits(9, 3, WIDE), logits[row : row + 1]])
        others = {name: [1, 0.5 if name != "top_k" else 3, 1, value] for name, value in warped.items()}
        alone = choose(mixed, columns(4, seeds=[1, 2, 3, seeds[row]], positions=[1, 1, 1, positions[row]], **others))
        assert alone.token_ids_S[3] == together.token_ids_S[row]
        assert alone.logprobs_S[3] == together.logprobs_S[row]


def test_seeds_and_positions_change_draws() -> None:
    logits = random_logits(3, 1, WIDE, scale=0.5).expand(64, -1)
    by_seed = choose(logits, columns(64, seeds=np.arange(64)))
    by_position = choose(logits, columns(64, positions=np.arange(64)))
    assert len(set(by_seed.token_ids_S.tolist())) > 50
    assert len(set(by_position.token_ids_S.tolist())) > 50


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "warped",
    [{"do_sample": False}, {}, {"top_k": 5}, {"top_p": 0.5, "typical_p": 0.5}, {"min_p": 0.1, "eta_cutoff": 0.1}],
)
def test_logits_that_are_not_finite_are_reported_and_leave_neighbours_alone(
    poison: float, warped: dict[str, float]
) -> None:
    logits = random_logits(4, 3, WIDE)
    clean = choose(logits.clone(), columns(3, **warped))
    logits[1, 17] = poison
    logits[2] = -torch.inf
    chosen = choose(logits, columns(3, **warped))
    assert chosen.token_ids_S.tolist() == [clean.token_ids_S[0].item(), -1, -1]


def test_the_likeliest_include_ties_and_leave_out_what_was_cut() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, 0.0]])
    listed = choose(logits, columns(1, do_sample=False, top_n=2)).top[0]
    assert listed is not None
    assert listed[0].tolist() == [0, 2, 3]
    cut = choose(logits, columns(1, top_k=1, top_n=4)).top[0]
    assert cut is not None
    assert (cut[0].tolist(), cut[1].tolist()) == ([0], [0.0])


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    width=st.sampled_from([2, 40, WIDE, VERY_WIDE]),
    scale=st.sampled_from([0.0, 1.0, 50.0]),
    warped=st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(1e-3, 1e3),
            "top_k": st.integers(0, 6000),
            "top_p": st.floats(0.0, 1.0),
            "min_p": st.floats(0.0, 1.0),
            "typical_p": st.floats(1e-6, 1.0),
            "epsilon_cutoff": st.floats(0.0, 0.99),
            "eta_cutoff": st.floats(0.0, 0.99),
            "keep": st.integers(1, 3),
            "renormalize": st.booleans(),
        },
    ),
)
def test_any_legal_parameters_draw_a_finite_token(
    seed: int, width: int, scale: float, warped: dict[str, float]
) -> None:
    made = columns(2, top_n=width, **warped)
    chosen = choose(process_logits(random_logits(seed, 2, width, scale), made, np.zeros(2, dtype=np.int32)), made)
    for token_id, listed in zip(chosen.token_ids_S.tolist(), chosen.top, strict=True):
        assert 0 <= token_id < width
        assert listed is not None
        assert token_id in listed[0]
        assert listed[1].double().exp().sum().item() == pytest.approx(1.0, abs=1e-4)


def survivors(logits: torch.Tensor, **values: object) -> list[list[int]]:
    """The ids that survive, sample by sample."""
    left: list[list[int]] = [[]] * len(logits)
    for group in warped_groups(logits, columns(len(logits), **values)):
        for index, sample in enumerate(group.samples_G):
            left[sample] = sorted(group.ids_GM[index][group.scores_GM[index] > -torch.inf].tolist())
    return left


SETTINGS = {"top_p": 0.9, "min_p": 0.02, "typical_p": 0.8, "epsilon_cutoff": 0.001, "eta_cutoff": 0.001}
ORACLES = {
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "epsilon_cutoff": EpsilonLogitsWarper,
    "eta_cutoff": EtaLogitsWarper,
}


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])  # from distributions that no shortcut holds to a few likely tokens
@pytest.mark.parametrize("name", SETTINGS)
def test_each_warper_alone_keeps_what_transformers_keeps(name: str, scale: float, keep: int) -> None:
    logits = random_logits(7, 3, VERY_WIDE, scale)
    wanted = ORACLES[name](SETTINGS[name], min_tokens_to_keep=keep)(torch.zeros(3, 1, dtype=torch.long), logits.clone())
    kept = survivors(logits.clone(), **{name: SETTINGS[name]}, keep=keep)
    for row in range(3):
        # Sums are double precision here, single there: at a threshold one token may differ.
        assert len(set(kept[row]) ^ set(torch.isfinite(wanted[row]).nonzero().flatten().tolist())) <= 1


@pytest.mark.parametrize(
    ("warped", "wanted"),
    [
        ({"top_k": 1}, [0, 1, 2]),
        ({"top_p": 0.0}, [0, 1, 2]),
        ({"min_p": 1.0}, [0, 1, 2]),
        ({"epsilon_cutoff": 0.9}, [0, 1, 2]),
        ({"eta_cutoff": 0.9}, [0, 1, 2]),
        ({"typical_p": 0.01}, [1, 2, 3]),  # nearest to the entropy of 1.45, which the likeliest is not
    ],
)
def test_the_tokens_to_keep_survive_every_warper(warped: dict[str, float], wanted: list[int]) -> None:
    logits = torch.tensor([[0.45, 0.15, 0.14, 0.135, 0.125]]).log()
    assert survivors(logits, keep=3, **warped) == [wanted]


def test_what_survives_does_not_depend_on_neighbours_that_need_another_way() -> None:
    few, many = random_logits(1, 2, VERY_WIDE, 8.0), random_logits(2, 2, VERY_WIDE, 0.1)
    mixed = torch.stack([few[0], many[0], few[1], many[1]])
    for name, value in SETTINGS.items():
        together = survivors(mixed.clone(), **{name: value})
        assert together == [survivors(row[None].clone(), **{name: value})[0] for row in mixed]


def test_many_samples_are_worked_on_in_blocks() -> None:
    num_samples = 3 * BLOCK_ELEMENTS // WIDE
    groups = list(warped_groups(random_logits(1, num_samples, WIDE), columns(num_samples)))
    assert len(groups) >= 3
    assert sorted(sample for group in groups for sample in group.samples_G) == list(range(num_samples))


def test_renormalised_scores_are_log_probabilities_of_what_is_left() -> None:
    logits = random_logits(5, 2, 40)
    for group in warped_groups(logits, columns(2, renormalize=[True, False], top_k=5)):
        masses = group.scores_GM.exp().sum(dim=-1)
        assert masses[0].item() == pytest.approx(1.0, abs=1e-5)
        assert masses[1].item() > 2.0


def test_samples_that_do_not_draw_are_not_warped() -> None:
    logits = random_logits(6, 1, 40)
    assert survivors(logits, do_sample=False, top_k=3, min_p=0.5, typical_p=0.1, eta_cutoff=0.5) == [list(range(40))]
