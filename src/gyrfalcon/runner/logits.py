"""Logits processors: what a request does to its scores before a token is chosen.

The order is that of transformers' `generate`, with what TGI adds: the watermark first, the frequency penalty after the
repetition penalty. Each works on the samples that ask for it, all at once; a neutral value leaves a sample's bits as
they are, and no sample's arithmetic depends on its neighbours. Scores are logits, or log-probabilities where beams add
them up.
Letters: S samples, V vocabulary, N ids that one processor looks at (all samples, packed), G samples of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gyrfalcon.runner.interface import Flags, IdLists, Ints, SamplingColumns, WeightedIdLists
from gyrfalcon.runner.noise import as_tensor, uniform_bits, watermark_keys

LARGEST = torch.finfo(torch.float32).max


def process_logits(scores_SV: Tensor, columns: SamplingColumns, last_ids_S: Ints) -> Tensor:
    """Every processor, in order, up to the temperature; float32, may change its input.

    last_ids_S: the token before the one to be drawn.
    """
    _add_watermark(scores_SV, columns, last_ids_S)
    _add_bias(scores_SV, columns.bias)
    _penalise_likeness(scores_SV, columns)
    if columns.history.ids.size:
        history = _locate(columns.history, scores_SV.device)
        _favour_prompt(scores_SV, history, columns)
        _penalise_repetition(scores_SV, history, columns)
        _penalise_frequency(scores_SV, history, columns)
    _forbid(scores_SV, columns.banned)
    _force(scores_SV, columns.forced)
    _remove_invalid(scores_SV, columns.remove_invalid_S)
    _hasten_the_end(scores_SV, columns)
    _forbid(scores_SV, columns.suppressed)
    _divide_by_temperature(scores_SV, columns)
    return scores_SV


@dataclass(frozen=True, slots=True)
class _Places:
    """Where packed ids stand in a matrix of scores."""

    samples_N: Tensor
    ids_N: Tensor


def _locate(lists: IdLists | WeightedIdLists, device: torch.device) -> _Places:
    samples = np.repeat(np.arange(len(lists.starts) - 1), np.diff(lists.starts))
    return _Places(torch.from_numpy(samples).to(device), torch.from_numpy(lists.ids.astype(np.int64)).to(device))


def _rows(flags_S: Flags, device: torch.device) -> Tensor:
    return torch.from_numpy(np.flatnonzero(flags_S)).to(device)


def _add_watermark(scores_SV: Tensor, columns: SamplingColumns, last_ids_S: Ints) -> None:
    """Add delta to the green tokens: those whose uniform number, by key and context, is below gamma."""
    marked = np.flatnonzero(columns.watermark_gamma_S > 0)
    if marked.size == 0:
        return
    device = scores_SV.device
    contexts_GW = _contexts(last_ids_S[marked], columns.watermark_context.take(marked))
    keys_G = as_tensor(watermark_keys(columns.watermark_key_S[marked], contexts_GW), device)
    ids_V = torch.arange(scores_SV.shape[1], device=device)
    thresholds_G = torch.from_numpy((columns.watermark_gamma_S[marked].astype(np.float64) * 2**53).astype(np.int64))
    deltas_G = torch.from_numpy(columns.watermark_delta_S[marked]).to(device)
    # One sample at a time: what its generator computes then stays in the cache.
    for sample, key, threshold, delta in zip(marked, keys_G, thresholds_G.to(device), deltas_G, strict=True):
        scores_SV[sample] += (uniform_bits(key, ids_V) < threshold) * delta


def _contexts(last_ids_G: Ints, earlier: IdLists) -> Ints:
    """The last id and those before it, the nearest first, filled up with -1."""
    lengths_G = np.diff(earlier.starts)
    contexts_GW = np.full((len(last_ids_G), 1 + int(lengths_G.max(initial=0))), -1, dtype=np.int32)
    contexts_GW[:, 0] = last_ids_G
    contexts_GW[:, 1:][np.arange(contexts_GW.shape[1] - 1) < lengths_G[:, None]] = earlier.ids
    return contexts_GW


def _add_bias(scores_SV: Tensor, bias: WeightedIdLists) -> None:
    if bias.ids.size == 0:
        return
    places = _locate(bias, scores_SV.device)
    scores_SV[places.samples_N, places.ids_N] += torch.from_numpy(bias.weights).to(scores_SV.device)


def _penalise_likeness(scores_SV: Tensor, columns: SamplingColumns) -> None:
    """Subtract what earlier groups' choices of this position cost (Vijayakumar et al. 2016, the Hamming diversity)."""
    if columns.diversity.ids.size == 0:
        return
    places = _locate(columns.diversity, scores_SV.device)
    counts = torch.from_numpy(columns.diversity.weights).to(scores_SV.device)
    penalties = torch.from_numpy(columns.diversity_penalty_S).to(scores_SV.device)[places.samples_N]
    scores_SV[places.samples_N, places.ids_N] -= penalties * counts


def _favour_prompt(scores_SV: Tensor, history: _Places, columns: SamplingColumns) -> None:
    """A repetition penalty on the prompt's ids alone, by the inverse of the given one."""
    if (columns.encoder_repetition_factor_S == 1.0).all():
        return
    starts = columns.history.starts
    lengths = np.diff(starts)
    offsets = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    is_prompt = torch.from_numpy(offsets < np.repeat(columns.prompt_lens_S, lengths)).to(scores_SV.device)
    prompt = _Places(history.samples_N[is_prompt], history.ids_N[is_prompt])
    _scale_seen(scores_SV, prompt, torch.from_numpy(columns.encoder_repetition_factor_S))


def _penalise_repetition(scores_SV: Tensor, history: _Places, columns: SamplingColumns) -> None:
    if (columns.repetition_penalty_S == 1.0).all():
        return
    _scale_seen(scores_SV, history, torch.from_numpy(columns.repetition_penalty_S))


def _scale_seen(scores_SV: Tensor, seen: _Places, factors_S: Tensor) -> None:
    """Divide positive and multiply negative scores of the ids seen, once an id (Keskar et al. 2019, section 4.1)."""
    scores_N = scores_SV[seen.samples_N, seen.ids_N]
    factors_N = factors_S.to(scores_SV.device)[seen.samples_N]
    # An id that occurs twice is written twice with one value: it was computed from the score as it was.
    scores_SV[seen.samples_N, seen.ids_N] = torch.where(scores_N < 0, scores_N * factors_N, scores_N / factors_N)


def _penalise_frequency(scores_SV: Tensor, history: _Places, columns: SamplingColumns) -> None:
    """Subtract the penalty times the id's share of all tokens so far, prompt included."""
    penalties = columns.frequency_penalty_S
    if (penalties == 0.0).all():
        return
    width = scores_SV.shape[1]
    cells, counts = torch.unique(history.samples_N * width + history.ids_N, return_counts=True)
    samples, ids = cells // width, cells % width
    lengths = torch.from_numpy(np.diff(columns.history.starts)).to(cells.device)
    weights = torch.from_numpy(penalties).to(cells.device)[samples]
    scores_SV[samples, ids] -= weights * counts / lengths[samples]


def _forbid(scores_SV: Tensor, lists: IdLists) -> None:
    if lists.ids.size == 0:
        return
    places = _locate(lists, scores_SV.device)
    scores_SV[places.samples_N, places.ids_N] = -torch.inf


def _force(scores_SV: Tensor, forced: IdLists) -> None:
    """Leave nothing but the forced ids where there are some, alike among themselves."""
    if forced.ids.size == 0:
        return
    scores_SV[_rows(np.diff(forced.starts) > 0, scores_SV.device)] = -torch.inf
    places = _locate(forced, scores_SV.device)
    scores_SV[places.samples_N, places.ids_N] = 0.0


def _remove_invalid(scores_SV: Tensor, remove_invalid_S: Flags) -> None:
    if not remove_invalid_S.any():
        return
    where_G = _rows(remove_invalid_S, scores_SV.device)
    scores_SV[where_G] = scores_SV[where_G].nan_to_num_(nan=0.0, posinf=LARGEST, neginf=-LARGEST)


def _hasten_the_end(scores_SV: Tensor, columns: SamplingColumns) -> None:
    """Raise the scores of the ids that end a text by a multiple of their absolute value, within single precision."""
    if columns.decaying.ids.size == 0:
        return
    places = _locate(columns.decaying, scores_SV.device)
    decay_N = torch.from_numpy(columns.decay_S).to(scores_SV.device)[places.samples_N]
    scores_N = scores_SV[places.samples_N, places.ids_N]
    raised_N = (scores_N + scores_N.abs() * decay_N).clamp(max=LARGEST)
    scores_SV[places.samples_N, places.ids_N] = torch.where(scores_N.isfinite(), raised_N, scores_N)


def _divide_by_temperature(scores_SV: Tensor, columns: SamplingColumns) -> None:
    is_tempered = columns.do_sample_S & (columns.temperature_S != 1.0)
    if not is_tempered.any():
        return
    where_G = _rows(is_tempered, scores_SV.device)
    scores_GV = scores_SV[where_G]
    temperature_G1 = torch.from_numpy(columns.temperature_S).to(scores_SV.device)[where_G][:, None]
    # Near zero the quotients overflow. There the largest score is taken off first, so that the others become -inf
    # instead of all of them infinite; what that adds to every score does not change a distribution.
    largest_G1 = scores_GV.amax(dim=-1, keepdim=True)
    overflows_G1 = largest_G1.isfinite() & ~(largest_G1 / temperature_G1).isfinite()
    scores_GV -= torch.where(overflows_G1, largest_G1, 0.0)
    scores_SV[where_G] = scores_GV.div_(temperature_G1)
