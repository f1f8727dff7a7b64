"""Chooses tokens: warps each sample's distribution, then takes its best token or draws from what is left.

The reported log-probability is of what is left. No sample's arithmetic depends on its neighbours: samples are grouped
by their own parameters and scores, and every group has one fixed width.
Letters: S samples, G the samples of one group, V vocabulary, M candidates kept for a sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gyrfalcon.runner.interface import SamplingColumns
from gyrfalcon.runner.noise import as_tensor, draw_keys, gumbel
from gyrfalcon.runner.warpers import keep_any, keep_head, warper_columns

NARROW_WIDTHS = (320, 4096)
"""How many of the largest scores are looked at, one after the other, before all are sorted, which takes ten times as
long: most distributions end within the first few hundred."""

BLOCK_ELEMENTS = 2**17
"""Scores of a CPU's group: in double precision they fill a megabyte, which a core's cache holds beside a copy."""

DEVICE_BLOCK_ELEMENTS = 2**26
"""Scores of another device's group: bounds its temporaries at half a gigabyte each."""

Indices = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The tokens chosen, one a sample, and the likeliest candidates where asked for."""

    token_ids_S: Tensor  # int64; -1 where the scores hold NaN, +inf or nothing finite
    logprobs_S: Tensor  # float32, natural log
    top: list[tuple[Tensor, Tensor] | None]  # (ids, logprobs), descending


@dataclass(frozen=True, slots=True)
class WarpedGroup:
    """What is left of some samples' distributions: `scores_GM[i, j]` is the warped score of token `ids_GM[i, j]`.

    Tokens that are not listed have a score of -inf. Of equal scores the lowest id comes first.
    """

    samples_G: Indices
    ids_GM: Tensor
    scores_GM: Tensor


def choose(scores_SV: Tensor, columns: SamplingColumns) -> Chosen:
    """One token a sample from processed scores, float32."""
    num_samples, device = scores_SV.shape[0], scores_SV.device
    token_ids_S = torch.empty(num_samples, dtype=torch.int64, device=device)
    logprobs_S = torch.empty(num_samples, dtype=torch.float32, device=device)
    top: list[tuple[Tensor, Tensor] | None] = [None] * num_samples
    for group in warped_groups(scores_SV, columns):
        logprobs_GM = torch.log_softmax(group.scores_GM, dim=-1)
        chosen_G1 = perturbed_scores(group, columns).argmax(dim=-1, keepdim=True)
        where_G = torch.from_numpy(group.samples_G).to(device)
        token_ids_S[where_G] = group.ids_GM.gather(1, chosen_G1).squeeze(1)
        logprobs_S[where_G] = logprobs_GM.gather(1, chosen_G1).squeeze(1)
        for index, sample in enumerate(group.samples_G):
            if columns.top_n_S[sample]:
                top[sample] = _likeliest(group.ids_GM[index], logprobs_GM[index], int(columns.top_n_S[sample]))
    token_ids_S[~torch.isfinite(logprobs_S)] = -1
    return Chosen(token_ids_S, logprobs_S, top)


def warped_groups(scores_SV: Tensor, columns: SamplingColumns) -> Iterator[WarpedGroup]:
    """The samples' candidates after their warpers, and renormalised where asked for; every sample in one group.

    All samples of a group draw, or none does.
    """
    for group in _groups(scores_SV, columns):
        renormalize_G = columns.renormalize_S[group.samples_G]
        scores_GM = group.scores_GM
        if renormalize_G.any():
            where_G1 = torch.from_numpy(renormalize_G).to(scores_GM.device)[:, None]
            scores_GM = torch.where(where_G1, torch.log_softmax(scores_GM, dim=-1), scores_GM)
        yield WarpedGroup(group.samples_G, group.ids_GM, scores_GM)


def perturbed_scores(group: WarpedGroup, columns: SamplingColumns) -> Tensor:
    """What a choice maximises: the score, or the score plus the sample's own Gumbel noise, which makes it a draw."""
    if not columns.do_sample_S[group.samples_G[0]]:
        return group.scores_GM
    keys = draw_keys(columns.seeds_S[group.samples_G], columns.positions_S[group.samples_G])
    return group.scores_GM.double() + gumbel(as_tensor(keys, group.ids_GM.device)[:, None], group.ids_GM)


def _groups(scores_SV: Tensor, columns: SamplingColumns) -> Iterator[WarpedGroup]:
    """The samples by what their warpers need: nothing, the largest scores, all scores in order, or all as they are."""
    width = scores_SV.shape[1]
    has_top_k = (columns.top_k_S > 0) & (columns.top_k_S < width)
    needs_order = columns.do_sample_S & (has_top_k | (columns.top_p_S < 1.0) | (columns.min_p_S > 0.0))
    is_cut = (columns.typical_p_S < 1.0) | (columns.epsilon_cutoff_S > 0.0) | (columns.eta_cutoff_S > 0.0)
    needs_all = columns.do_sample_S & ~needs_order & is_cut
    for plain in (~columns.do_sample_S, columns.do_sample_S & ~needs_order & ~needs_all):
        for block_G in _blocks(np.flatnonzero(plain), scores_SV):
            yield _as_they_are(scores_SV, block_G)
    for block_G in _blocks(np.flatnonzero(needs_all), scores_SV):
        group = _as_they_are(scores_SV, block_G)
        settings = warper_columns(columns.take(block_G), scores_SV.device)
        yield WarpedGroup(block_G, group.ids_GM, keep_any(group.scores_GM, settings))
    for narrow_width in NARROW_WIDTHS:
        # A fifth is room for ties with the k-th score.
        has_room = np.maximum(columns.top_k_S, columns.keep_S) <= narrow_width * 4 // 5
        narrow_G = np.flatnonzero(needs_order & has_room)
        if narrow_G.size == 0 or narrow_width >= width:
            continue
        group, fits_G = _narrow(scores_SV, narrow_G, columns, narrow_width)
        needs_order[narrow_G[fits_G]] = False
        if fits_G.any():
            where_G = torch.from_numpy(fits_G).to(scores_SV.device)
            yield WarpedGroup(narrow_G[fits_G], group.ids_GM[where_G], group.scores_GM[where_G])
    for block_G in _blocks(np.flatnonzero(needs_order), scores_SV):
        group = _in_order(scores_SV, block_G, width)
        settings = warper_columns(columns.take(block_G), scores_SV.device)
        yield WarpedGroup(block_G, group.ids_GM, keep_any(keep_head(group.scores_GM, settings), settings))


def _blocks(samples_G: Indices, scores_SV: Tensor) -> Iterator[Indices]:
    """A few samples at a time, so that what is computed between their scores and their tokens stays in the cache."""
    most = BLOCK_ELEMENTS if scores_SV.device.type == "cpu" else DEVICE_BLOCK_ELEMENTS
    count = max(1, most // scores_SV.shape[1])
    for start in range(0, len(samples_G), count):
        yield samples_G[start : start + count]


def _as_they_are(scores_SV: Tensor, samples_G: Indices) -> WarpedGroup:
    ids_V = torch.arange(scores_SV.shape[1], device=scores_SV.device)
    is_all = len(samples_G) == len(scores_SV)
    scores_GV = scores_SV if is_all else scores_SV[torch.from_numpy(samples_G).to(scores_SV.device)]
    return WarpedGroup(samples_G, ids_V.expand(len(samples_G), -1), scores_GV)


def _narrow(
    scores_SV: Tensor, samples_G: Indices, columns: SamplingColumns, width: int
) -> tuple[WarpedGroup, npt.NDArray[np.bool_]]:
    """The samples warped within their `width` largest scores, and which of them need no more than those."""
    group = _in_order(scores_SV, samples_G, width)
    settings = warper_columns(columns.take(samples_G), scores_SV.device)
    mass_G1 = None
    needs_mass = (columns.top_k_S[samples_G] == 0) & (columns.top_p_S[samples_G] < 1.0)
    if needs_mass.any():
        mass_G1 = torch.ones(len(samples_G), 1, dtype=torch.float64, device=scores_SV.device)
        where_G = torch.from_numpy(samples_G[needs_mass]).to(scores_SV.device)
        largest_G1 = torch.log_softmax(scores_SV[where_G], dim=-1).amax(dim=-1, keepdim=True)
        mass_G1[torch.from_numpy(needs_mass).to(scores_SV.device)] = (-largest_G1).double().exp()
    scores_GM = keep_head(group.scores_GM, settings, mass_G1)
    # Beyond these stand smaller scores only, or equals of the last: when the least survivor is larger than that, none
    # of them survives. Samples with a NaN fail anyway.
    least_G = scores_GM.masked_fill(scores_GM == -torch.inf, torch.inf).amin(dim=1)
    fits_G = (group.scores_GM[:, -1] < least_G) | group.scores_GM.isnan().any(dim=1)
    return WarpedGroup(samples_G, group.ids_GM, keep_any(scores_GM, settings)), fits_G.cpu().numpy()


def _in_order(scores_SV: Tensor, samples_G: Indices, width: int) -> WarpedGroup:
    """The `width` largest scores of each sample, descending, ties by ascending id."""
    scores_GV = scores_SV[torch.from_numpy(samples_G).to(scores_SV.device)]
    if width == scores_GV.shape[1]:
        return WarpedGroup(samples_G, *reversed(scores_GV.sort(dim=-1, descending=True, stable=True)))
    ids_GM = scores_GV.topk(width, dim=-1, sorted=False).indices.sort(dim=-1).values
    scores_GM, order_GM = scores_GV.gather(1, ids_GM).sort(dim=-1, descending=True, stable=True)
    return WarpedGroup(samples_G, ids_GM.gather(1, order_GM), scores_GM)


def _likeliest(ids_M: Tensor, logprobs_M: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest candidates that survived, ties with the last included; descending, ties by id."""
    threshold = logprobs_M.topk(min(count, len(logprobs_M))).values[-1]
    kept = (logprobs_M >= threshold) & (logprobs_M > -torch.inf)
    ids, by_id = ids_M[kept].sort()
    logprobs, order = logprobs_M[kept][by_id].sort(descending=True, stable=True)
    return ids[order], logprobs
