"""Sampling columns for tests: one keyword a column, neutral by default."""

from __future__ import annotations

from typing import Any

import numpy as np

from gyrfalcon.runner.interface import SamplingColumns

NEUTRAL = {
    "positions_S": (np.int32, 0),
    "seeds_S": (np.uint64, 0),
    "do_sample_S": (np.bool_, True),
    "temperature_S": (np.float32, 1.0),
    "top_k_S": (np.int32, 0),
    "top_p_S": (np.float32, 1.0),
    "typical_p_S": (np.float32, 1.0),
    "repetition_penalty_S": (np.float32, 1.0),
    "frequency_penalty_S": (np.float32, 0.0),
    "watermark_gamma_S": (np.float32, 0.0),
    "watermark_delta_S": (np.float32, 0.0),
    "watermark_key_S": (np.uint64, 0),
    "top_n_S": (np.int32, 0),
}


def columns(num_samples: int, history: list[list[int]] | None = None, **values: Any) -> SamplingColumns:
    """Columns of `num_samples` samples; a value is a scalar for all or a list with one entry a sample."""
    made: dict[str, Any] = {}
    for name, (dtype, neutral) in NEUTRAL.items():
        given = values.pop(name.removesuffix("_S"), neutral)
        made[name] = np.broadcast_to(np.asarray(given, dtype=dtype), (num_samples,)).copy()
    history_ids, history_starts = pack(history or [[]] * num_samples)
    banned_ids, banned_starts = pack(values.pop("banned", [[]] * num_samples))
    assert not values, f"no such column: {sorted(values)}"
    return SamplingColumns(
        rows_S=np.arange(num_samples, dtype=np.int32),
        history_ids=history_ids,
        history_starts=history_starts,
        banned_ids=banned_ids,
        banned_starts=banned_starts,
        **made,
    )


def pack(parts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
    return np.array([i for part in parts for i in part], dtype=np.int32), starts
