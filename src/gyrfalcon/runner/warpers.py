"""Warpers: which of a distribution's tokens may be drawn. What does not survive becomes -inf.

Each works on the rows that ask for it. Sums are in double precision
and taken one element after the other (`cumsum`): `sum` splits a lone row over threads, and its bits with it.
Letters: G samples of a group, M candidates of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gyrfalcon.runner.interface import SamplingColumns

NEAREST = 320
"""Tokens nearest to the entropy that are looked at before all are sorted."""


@dataclass(frozen=True, slots=True)
class WarperColumns:
    """The warpers' settings of a group, on its device; off is as in `SamplingColumns`."""

    top_k_G1: Tensor
    top_p_G1: Tensor
    min_p_G1: Tensor
    typical_p_G1: Tensor
    epsilon_G1: Tensor
    eta_G1: Tensor
    keep_G1: Tensor


def warper_columns(columns: SamplingColumns, device: torch.device) -> WarperColumns:
    def column(values_G: Tensor) -> Tensor:
        return values_G.to(device)[:, None]

    return WarperColumns(
        top_k_G1=column(torch.from_numpy(columns.top_k_S).long()),
        top_p_G1=column(torch.from_numpy(columns.top_p_S).double()),
        min_p_G1=column(torch.from_numpy(columns.min_p_S).double()),
        typical_p_G1=column(torch.from_numpy(columns.typical_p_S).double()),
        epsilon_G1=column(torch.from_numpy(columns.epsilon_cutoff_S).double()),
        eta_G1=column(torch.from_numpy(columns.eta_cutoff_S).double()),
        keep_G1=column(torch.from_numpy(columns.keep_S).long()),
    )


def keep_head(scores_GM: Tensor, settings: WarperColumns, mass_G1: Tensor | None = None) -> Tensor:
    """Top-k, top-p and min-p, which keep the beginning of scores in descending order.

    mass_G1: of all a row's tokens, in units of its likeliest one's probability, for the rows without top-k; where the
    candidates are not all tokens. Without it the candidates are all.
    """
    scores_GM = _keep_top_k(scores_GM, settings)
    weights_GM = (scores_GM - scores_GM[:, :1]).double().exp()
    cut_GM = (weights_GM < settings.min_p_G1) & (settings.min_p_G1 > 0.0)
    if (settings.top_p_G1 < 1.0).any():
        sums_GM = weights_GM.cumsum(dim=-1)
        total_G1 = sums_GM[:, -1:]
        if mass_G1 is not None:
            total_G1 = torch.where(settings.top_k_G1 > 0, total_G1, mass_G1)
        # Up to and including the token that makes the mass reach p (Holtzman et al. 2020, section 3.1).
        cut_GM |= (sums_GM - weights_GM >= settings.top_p_G1 * total_G1) & (settings.top_p_G1 < 1.0)
    return scores_GM.masked_fill(cut_GM & (_places(scores_GM) >= settings.keep_G1), -torch.inf)


def keep_any(scores_GM: Tensor, settings: WarperColumns) -> Tensor:
    """Typical-p, epsilon and eta cut-off, of scores in any order."""
    if (settings.typical_p_G1 < 1.0).any():
        scores_GM = _keep_typical(scores_GM, settings)
    if (settings.epsilon_G1 > 0.0).any():
        scores_GM = _cut_below(scores_GM, settings.epsilon_G1, settings)
    if (settings.eta_G1 > 0.0).any():
        # Hewitt, Manning, Liang 2022, section 4.2.
        entropy_G1 = _information(scores_GM)[1]
        threshold_G1 = torch.minimum(settings.eta_G1, settings.eta_G1.sqrt() * (-entropy_G1).exp())
        scores_GM = _cut_below(scores_GM, threshold_G1, settings)
    return scores_GM


def _keep_top_k(scores_GM: Tensor, settings: WarperColumns) -> Tensor:
    width = scores_GM.shape[1]
    last_G1 = torch.maximum(settings.top_k_G1, settings.keep_G1).clamp(max=width) - 1
    is_cut_GM = (scores_GM < scores_GM.gather(1, last_G1)) & (settings.top_k_G1 > 0)
    return scores_GM.masked_fill(is_cut_GM, -torch.inf)


def _keep_typical(scores_GM: Tensor, settings: WarperColumns) -> Tensor:
    """Keep the tokens whose information is nearest to the entropy, up to a mass (Meister et al. 2022, section 4)."""
    logprobs_GM, entropy_G1 = _information(scores_GM)
    distance_GM = (-logprobs_GM - entropy_G1).abs()
    num_nearest = min(max(NEAREST, int(settings.keep_G1.max())), scores_GM.shape[1])
    nearest_GN, order_GN = distance_GM.topk(num_nearest, dim=-1, largest=False)
    mass_GN = logprobs_GM.gather(1, order_GN).exp().cumsum(dim=-1)
    farthest_G1 = _first_to_reach(nearest_GN, mass_GN, settings.typical_p_G1)
    is_short_G = ((mass_GN[:, -1:] < settings.typical_p_G1) & (settings.typical_p_G1 < 1.0)).squeeze(1)
    if is_short_G.any():
        sorted_GM, all_order_GM = distance_GM[is_short_G].sort(dim=-1, stable=True)
        mass_GM = logprobs_GM[is_short_G].gather(1, all_order_GM).exp().cumsum(dim=-1)
        farthest_G1[is_short_G] = _first_to_reach(sorted_GM, mass_GM, settings.typical_p_G1[is_short_G])
    # Those as far from the entropy as the last one kept stay with it.
    cut_GM = (distance_GM > farthest_G1) & (settings.typical_p_G1 < 1.0)
    is_kept_GN = _places(nearest_GN) < settings.keep_G1
    cut_GM.scatter_(1, order_GN, cut_GM.gather(1, order_GN) & ~is_kept_GN)
    return scores_GM.masked_fill(cut_GM, -torch.inf)


def _first_to_reach(sorted_GN: Tensor, mass_GN: Tensor, wanted_G1: Tensor) -> Tensor:
    """The value with which the mass reaches what is wanted, or the last one."""
    place_G1 = (mass_GN < wanted_G1).sum(dim=-1, keepdim=True).clamp(max=sorted_GN.shape[1] - 1)
    return sorted_GN.gather(1, place_G1)


def _cut_below(scores_GM: Tensor, threshold_G1: Tensor, settings: WarperColumns) -> Tensor:
    """Keep what is at least as likely as the threshold, and what ties with the last of those that always survive."""
    last_G1 = settings.keep_G1.clamp(max=scores_GM.shape[1]) - 1
    least_G1 = scores_GM.topk(int(last_G1.max()) + 1, dim=-1).values.gather(1, last_G1)
    is_cut_GM = (torch.softmax(scores_GM, dim=-1, dtype=torch.float64) < threshold_G1) & (scores_GM < least_G1)
    return scores_GM.masked_fill(is_cut_GM, -torch.inf)


def _information(scores_GM: Tensor) -> tuple[Tensor, Tensor]:
    """The log-probabilities, and their distribution's entropy in nats."""
    logprobs_GM = torch.log_softmax(scores_GM, dim=-1, dtype=torch.float64)
    shares_GM = torch.where(logprobs_GM == -torch.inf, 0.0, logprobs_GM.exp() * -logprobs_GM)
    return logprobs_GM, shares_GM.cumsum(dim=-1)[:, -1:]


def _places(scores_GM: Tensor) -> Tensor:
    return torch.arange(scores_GM.shape[1], device=scores_GM.device)
