"""Door 2: a step's plan in, its candidates out. Plain values of numpy columns, free of torch.

A plan holds everything a step depends on: it can be logged, replayed, or sent to other ranks.
Letters: R rows (sequences in the step), T tokens (all rows, packed), S samples (draws; a row may have several),
W blocks in the widest table, C block copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]
Seeds = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class SamplingColumns:
    """One entry a sample; the meaning of each value is that of `engine.interface.SamplingParams`."""

    rows_S: Ints  # index into the plan's rows; repeated when a prompt's first token is drawn for several choices
    positions_S: Ints  # position the drawn token will take
    seeds_S: Seeds
    do_sample_S: Flags
    temperature_S: Floats
    top_k_S: Ints
    top_p_S: Floats
    typical_p_S: Floats
    repetition_penalty_S: Floats
    frequency_penalty_S: Floats
    watermark_gamma_S: Floats  # 0 where there is no watermark
    watermark_delta_S: Floats
    watermark_key_S: Seeds
    top_n_S: Ints  # likeliest tokens to report; 0 for none
    history_ids: Ints  # all token ids so far of the samples that need them, packed
    history_starts: Longs  # [S + 1]; an empty range where no history is needed
    banned_ids: Ints  # ids whose logits become -inf, packed
    banned_starts: Longs  # [S + 1]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes. Rows with a query length above one are prefilling or catching up."""

    query_lens_R: Ints  # tokens run this step, >= 1
    context_lens_R: Ints  # tokens already in the cache
    token_ids_T: Ints  # row by row
    block_tables_RW: Ints  # padded with 0
    block_copies_C2: Ints  # (source, destination), done before the forward pass
    samples: SamplingColumns
    scored_rows: Ints  # rows whose query tokens' successors are scored (prompt log-probabilities)
    scored_ids: Ints  # for each scored row, the id after each of its query tokens, packed; -1 where unknown


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the step found, in the order of the plan's samples and scored rows."""

    token_ids_S: Ints  # -1 where the logits held no finite value to choose: the request fails
    logprobs_S: Floats
    top_ids: Ints  # packed; see `top_starts`
    top_logprobs: Floats
    top_starts: Longs  # [S + 1]
    scored_logprobs: Floats  # parallel to the plan's `scored_ids`; NaN where the id was -1
    forward_s: float = 0.0  # seconds in the model
    sample_s: float = 0.0  # seconds from hidden states to chosen tokens and scores


@dataclass(frozen=True, slots=True)
class ExecutorFacts:
    """What loading the model found; the engine sizes its pool from it."""

    vocab_size: int
    max_context: int
    num_blocks: int  # block 0 is never allocated: padded table entries point at it
    block_size: int  # tokens
    cache_bytes: int
    weight_bytes: int
    num_parameters: int
    dtype: str
    device: str


class Executor(Protocol):
    """Runs plans, one at a time, on one device or on several ranks."""

    @property
    def facts(self) -> ExecutorFacts: ...

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step; the caller passes the next plan only after this returns."""
        ...

    def close(self) -> None:
        """Free the device's memory; idempotent."""
        ...
