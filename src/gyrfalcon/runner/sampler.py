"""Chooses tokens: warps each row's distribution (top-k, top-p, typical), then takes its best or draws from it.

What does not survive a warper becomes -inf; the reported log-probability is of what is left. No row's arithmetic
depends on its neighbours: rows are grouped by their own parameters, and every group has one fixed width.
Letters: S samples, G the samples of one group, V vocabulary, M candidates kept for a row.
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

NARROW_TOP_K = 256
NARROW_WIDTH = 320  # room for ties with the k-th logit; a row that has more of them is sorted whole

Indices = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The tokens chosen, one a sample, and the likeliest candidates where asked for."""

    token_ids_S: Tensor  # int64; -1 where the logits hold NaN, +inf or nothing finite
    logprobs_S: Tensor  # float32, natural log
    top: list[tuple[Tensor, Tensor] | None]  # (ids, logprobs), descending


@dataclass(frozen=True, slots=True)
class _Group:
    """Candidates of some samples: `logits_GM[i, j]` is the warped logit of token `ids_GM[i, j]`."""

    samples_G: Indices
    ids_GM: Tensor
    logits_GM: Tensor


def choose(logits_SV: Tensor, columns: SamplingColumns) -> Chosen:
    """One token a sample from processed logits, float32."""
    num_samples, device = logits_SV.shape[0], logits_SV.device
    token_ids_S = torch.empty(num_samples, dtype=torch.int64, device=device)
    logprobs_S = torch.empty(num_samples, dtype=torch.float32, device=device)
    top: list[tuple[Tensor, Tensor] | None] = [None] * num_samples
    for group in _groups(logits_SV, columns):
        logprobs_GM = torch.log_softmax(group.logits_GM, dim=-1)
        chosen_G1 = _scores(group, columns).argmax(dim=-1, keepdim=True)
        where_G = torch.from_numpy(group.samples_G).to(device)
        token_ids_S[where_G] = group.ids_GM.gather(1, chosen_G1).squeeze(1)
        logprobs_S[where_G] = logprobs_GM.gather(1, chosen_G1).squeeze(1)
        for index, sample in enumerate(group.samples_G):
            if columns.top_n_S[sample]:
                top[sample] = _likeliest(group.ids_GM[index], logprobs_GM[index], int(columns.top_n_S[sample]))
    token_ids_S[~torch.isfinite(logprobs_S)] = -1
    return Chosen(token_ids_S, logprobs_S, top)


def _groups(logits_SV: Tensor, columns: SamplingColumns) -> Iterator[_Group]:
    """The samples by what their warpers need: nothing, a few of the largest logits, or all in order."""
    width = logits_SV.shape[1]
    top_k = columns.top_k_S
    is_warped = columns.do_sample_S & (
        ((top_k > 0) & (top_k < width)) | (columns.top_p_S < 1.0) | (columns.typical_p_S < 1.0)
    )
    is_narrow = is_warped & (top_k > 0) & (top_k <= NARROW_TOP_K) & (width > NARROW_WIDTH)
    ids_V = torch.arange(width, device=logits_SV.device)
    for plain in (np.flatnonzero(~columns.do_sample_S), np.flatnonzero(columns.do_sample_S & ~is_warped)):
        if plain.size:
            yield _Group(plain, ids_V.expand(plain.size, -1), logits_SV[torch.from_numpy(plain)])
    if (narrow := np.flatnonzero(is_narrow)).size:
        group = _in_order(logits_SV, narrow, NARROW_WIDTH)
        top_k_G = torch.from_numpy(top_k[narrow]).to(logits_SV.device)
        kth_G1 = group.logits_GM.gather(1, top_k_G.long()[:, None] - 1)
        has_room = (group.logits_GM[:, -1:] < kth_G1).squeeze(1) | group.logits_GM.isnan().any(dim=1)
        is_narrow[narrow[~has_room.cpu().numpy()]] = False
        if has_room.any():
            kept = _Group(narrow[has_room.cpu().numpy()], group.ids_GM[has_room], group.logits_GM[has_room])
            yield _warp(kept, columns)
    if (wide := np.flatnonzero(is_warped & ~is_narrow)).size:
        yield _warp(_in_order(logits_SV, wide, width), columns)


def _in_order(logits_SV: Tensor, samples_G: Indices, width: int) -> _Group:
    """The `width` largest logits of each sample, descending, ties by ascending id."""
    logits_GV = logits_SV[torch.from_numpy(samples_G).to(logits_SV.device)]
    if width == logits_GV.shape[1]:
        return _Group(samples_G, *reversed(logits_GV.sort(dim=-1, descending=True, stable=True)))
    ids_GM = logits_GV.topk(width, dim=-1, sorted=False).indices.sort(dim=-1).values
    logits_GM, order_GM = logits_GV.gather(1, ids_GM).sort(dim=-1, descending=True, stable=True)
    return _Group(samples_G, ids_GM.gather(1, order_GM), logits_GM)


def _warp(group: _Group, columns: SamplingColumns) -> _Group:
    """Apply top-k, top-p and typical-p, in this order, to logits in descending order."""
    logits_GM = group.logits_GM
    device, width = logits_GM.device, logits_GM.shape[1]
    top_k_G = torch.from_numpy(columns.top_k_S[group.samples_G]).to(device)
    last_G = torch.where(top_k_G > 0, top_k_G, width).clamp(max=width).long() - 1
    logits_GM = logits_GM.masked_fill(logits_GM < logits_GM.gather(1, last_G[:, None]), -torch.inf)
    top_p_G = columns.top_p_S[group.samples_G]
    if (top_p_G < 1.0).any():
        logits_GM = _keep_top_p(logits_GM, torch.from_numpy(top_p_G).to(device))
    typical_p_G = columns.typical_p_S[group.samples_G]
    if (typical_p_G < 1.0).any():
        logits_GM = _keep_typical(logits_GM, torch.from_numpy(typical_p_G).to(device))
    return _Group(group.samples_G, group.ids_GM, logits_GM)


def _keep_top_p(logits_GM: Tensor, top_p_G: Tensor) -> Tensor:
    """Keep the likeliest tokens up to and including the one that makes their mass reach p (Holtzman et al. 2020)."""
    mass_GM = torch.softmax(logits_GM, dim=-1, dtype=torch.float64).cumsum(dim=-1)
    mass_before_GM = mass_GM.roll(1, dims=-1)
    mass_before_GM[:, 0] = 0.0
    is_cut = (mass_before_GM >= top_p_G[:, None].double()) & (top_p_G[:, None] < 1.0)
    is_cut[:, 0] = False
    return logits_GM.masked_fill(is_cut, -torch.inf)


def _keep_typical(logits_GM: Tensor, typical_p_G: Tensor) -> Tensor:
    """Keep the tokens whose information is nearest to the entropy, up to a mass (Meister et al. 2022, section 4)."""
    logprobs_GM = torch.log_softmax(logits_GM, dim=-1, dtype=torch.float64)
    probs_GM = logprobs_GM.exp()
    entropy_G1 = -(probs_GM * logprobs_GM).nansum(dim=-1, keepdim=True)
    distance_GM = (-logprobs_GM - entropy_G1).abs()
    sorted_GM, order_GM = distance_GM.sort(dim=-1, stable=True)
    mass_GM = probs_GM.gather(1, order_GM).cumsum(dim=-1)
    last_G1 = (mass_GM < typical_p_G[:, None].double()).sum(dim=-1, keepdim=True).clamp(max=logits_GM.shape[1] - 1)
    # Those as far from the entropy as the last one kept stay with it.
    is_cut = (distance_GM > sorted_GM.gather(1, last_G1)) & (typical_p_G[:, None] < 1.0)
    return logits_GM.masked_fill(is_cut, -torch.inf)


def _scores(group: _Group, columns: SamplingColumns) -> Tensor:
    """What the chosen candidate maximises: the logit, or the logit plus the request's own Gumbel noise."""
    if not columns.do_sample_S[group.samples_G[0]]:
        return group.logits_GM
    keys = draw_keys(columns.seeds_S[group.samples_G], columns.positions_S[group.samples_G])
    return group.logits_GM.double() + gumbel(as_tensor(keys, group.ids_GM.device)[:, None], group.ids_GM)


def _likeliest(ids_M: Tensor, logprobs_M: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest candidates that survived, ties with the last included; descending, ties by id."""
    threshold = logprobs_M.topk(min(count, len(logprobs_M))).values[-1]
    kept = (logprobs_M >= threshold) & (logprobs_M > -torch.inf)
    ids, by_id = ids_M[kept].sort()
    logprobs, order = logprobs_M[kept][by_id].sort(descending=True, stable=True)
    return ids[order], logprobs
