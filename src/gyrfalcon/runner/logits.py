"""Logits processors: what a request does to its logits before a token is chosen, in the order of TGI.

Each works on the rows that ask for it, all at once; a neutral value leaves a row's bits as they are.
Letters: S samples, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gyrfalcon.runner.interface import Ints, SamplingColumns
from gyrfalcon.runner.noise import as_tensor, uniform_bits, watermark_keys


def process_logits(logits_SV: Tensor, columns: SamplingColumns, last_ids_S: Ints) -> Tensor:
    """Watermark, repetition penalty, frequency penalty, banned ids, temperature; float32, may change its input.

    last_ids_S: the token before the one to be drawn.
    """
    _add_watermark(logits_SV, columns, last_ids_S)
    if columns.history_ids.size:
        _penalise_repetition(logits_SV, columns)
        _penalise_frequency(logits_SV, columns)
    if columns.banned_ids.size:
        samples, ids = _flat(logits_SV, columns.banned_ids, columns.banned_starts)
        logits_SV[samples, ids] = -torch.inf
    _divide_by_temperature(logits_SV, columns)
    return logits_SV


def _add_watermark(logits_SV: Tensor, columns: SamplingColumns, last_ids_S: Ints) -> None:
    """Add delta to the green tokens: those whose uniform number, by key and last token, is below gamma."""
    marked = np.flatnonzero(columns.watermark_gamma_S > 0)
    if marked.size == 0:
        return
    device = logits_SV.device
    keys = as_tensor(watermark_keys(columns.watermark_key_S[marked], last_ids_S[marked]), device)
    ids_V = torch.arange(logits_SV.shape[1], device=device)
    threshold = torch.from_numpy((columns.watermark_gamma_S[marked].astype(np.float64) * 2**53).astype(np.int64))
    is_green = uniform_bits(keys[:, None], ids_V) < threshold.to(device)[:, None]
    delta = torch.from_numpy(columns.watermark_delta_S[marked]).to(device)
    logits_SV[torch.from_numpy(marked).to(device)] += is_green * delta[:, None]


def _penalise_repetition(logits_SV: Tensor, columns: SamplingColumns) -> None:
    """Divide positive and multiply negative logits of every id seen, once an id (Keskar et al. 2019, section 4.1)."""
    penalties = columns.repetition_penalty_S
    if (penalties == 1.0).all():
        return
    samples, ids = _flat(logits_SV, columns.history_ids, columns.history_starts)
    seen = logits_SV[samples, ids]
    factors = torch.from_numpy(penalties).to(seen.device)[samples]
    # An id that occurs twice is written twice with one value: the penalty was computed from the logit as it was.
    logits_SV[samples, ids] = torch.where(seen < 0, seen * factors, seen / factors)


def _penalise_frequency(logits_SV: Tensor, columns: SamplingColumns) -> None:
    """Subtract the penalty times the id's share of all tokens so far, prompt included."""
    penalties = columns.frequency_penalty_S
    if (penalties == 0.0).all():
        return
    width = logits_SV.shape[1]
    samples, ids = _flat(logits_SV, columns.history_ids, columns.history_starts)
    cells, counts = torch.unique(samples * width + ids, return_counts=True)
    samples, ids = cells // width, cells % width
    lengths = torch.from_numpy(np.diff(columns.history_starts)).to(cells.device)
    weights = torch.from_numpy(penalties).to(cells.device)[samples]
    logits_SV[samples, ids] -= weights * counts / lengths[samples]


def _divide_by_temperature(logits_SV: Tensor, columns: SamplingColumns) -> None:
    tempered = np.flatnonzero(columns.temperature_S != 1.0)
    if tempered.size == 0:
        return
    where_S = torch.from_numpy(tempered).to(logits_SV.device)
    logits = logits_SV[where_S]
    # From the largest down, so that a temperature near zero sends the others to -inf instead of all to infinity.
    logits -= logits.amax(dim=-1, keepdim=True)
    logits_SV[where_S] = logits / torch.from_numpy(columns.temperature_S[tempered]).to(logits.device)[:, None]


def _flat(logits_SV: Tensor, packed_ids: Ints, starts: np.ndarray) -> tuple[Tensor, Tensor]:
    """Sample index and id of every packed entry."""
    samples = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    device = logits_SV.device
    return torch.from_numpy(samples).to(device), torch.from_numpy(packed_ids.astype(np.int64)).to(device)
