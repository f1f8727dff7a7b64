"""Sampling columns for tests: one keyword a column, neutral by default."""

from __future__ import annotations

from typing import Any

import numpy as np

from gyrfalcon.runner.interface import IdLists, SamplingColumns, WeightedIdLists

NEUTRAL = {
    "tokens_back_S": (np.int32, 0),
    "positions_S": (np.int32, 0),
    "seeds_S": (np.uint64, 0),
    "do_sample_S": (np.bool_, True),
    "watermark_gamma_S": (np.float32, 0.0),
    "watermark_delta_S": (np.float32, 0.0),
    "watermark_key_S": (np.uint64, 0),
    "diversity_penalty_S": (np.float32, 0.0),
    "prompt_lens_S": (np.int32, 0),
    "encoder_repetition_factor_S": (np.float32, 1.0),
    "repetition_penalty_S": (np.float32, 1.0),
    "frequency_penalty_S": (np.float32, 0.0),
    "remove_invalid_S": (np.bool_, False),
    "decay_S": (np.float32, 0.0),
    "temperature_S": (np.float32, 1.0),
    "top_k_S": (np.int32, 0),
    "top_p_S": (np.float32, 1.0),
    "min_p_S": (np.float32, 0.0),
    "typical_p_S": (np.float32, 1.0),
    "epsilon_cutoff_S": (np.float32, 0.0),
    "eta_cutoff_S": (np.float32, 0.0),
    "keep_S": (np.int32, 1),
    "renormalize_S": (np.bool_, False),
    "top_n_S": (np.int32, 0),
    "is_plain_S": (np.bool_, False),
    "num_candidates_S": (np.int32, 0),
}
LISTS = ("watermark_context", "history", "banned", "forced", "decaying", "suppressed")
WEIGHTED_LISTS = ("bias", "diversity")


def columns(num_samples: int, **values: Any) -> SamplingColumns:
    """Columns of `num_samples` samples; a value is a scalar for all or a list with one entry a sample.

    Lists of ids have one list a sample, weighted ones a dict of id to number a sample.
    """
    made: dict[str, Any] = {}
    for name, (dtype, neutral) in NEUTRAL.items():
        given = values.pop(name.removesuffix("_S"), neutral)
        made[name] = np.broadcast_to(np.asarray(given, dtype=dtype), (num_samples,)).copy()
    for name in LISTS:
        made[name] = pack(values.pop(name, [[]] * num_samples))
    for name in WEIGHTED_LISTS:
        parts: list[dict[int, float]] = values.pop(name, [{}] * num_samples)
        packed = pack([list(part) for part in parts])
        weights = np.array([weight for part in parts for weight in part.values()], dtype=np.float32)
        made[name] = WeightedIdLists(packed.ids, weights, packed.starts)
    assert not values, f"no such column: {sorted(values)}"
    return SamplingColumns(rows_S=np.arange(num_samples, dtype=np.int32), **made)


def pack(parts: list[list[int]]) -> IdLists:
    """The lists end to end."""
    starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
    return IdLists(np.array([i for part in parts for i in part], dtype=np.int32), starts)
