"""Gathers the scheduled rows into one step's plan: values of sequences become columns of numpy arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gyrfalcon.engine.interface import SamplingParams, WatermarkParams
from gyrfalcon.engine.scheduler import ScheduledRow
from gyrfalcon.engine.sequence import Sequence, SequenceGroup
from gyrfalcon.runner.interface import Ints, Longs, SamplingColumns, StepPlan

SEED_MASK = 2**64 - 1
NO_IDS = np.empty(0, dtype=np.int32)


def gather_plan(rows: list[ScheduledRow]) -> StepPlan:
    """The plan of one step. A row that reaches its end draws one token for every choice it carries."""
    widest = max(len(row.sequence.blocks) for row in rows)
    block_tables_RW = np.zeros((len(rows), widest), dtype=np.int32)
    for index, row in enumerate(rows):
        block_tables_RW[index, : len(row.sequence.blocks)] = row.sequence.blocks
    scored = [index for index, row in enumerate(rows) if row.group.scores_prompt]
    return StepPlan(
        query_lens_R=np.array([row.num_query_tokens for row in rows], dtype=np.int32),
        context_lens_R=np.array([row.sequence.num_computed_tokens for row in rows], dtype=np.int32),
        token_ids_T=np.concatenate([_query_ids(row) for row in rows]),
        block_tables_RW=block_tables_RW,
        block_copies_C2=np.array([pair for row in rows for pair in row.block_copies], dtype=np.int32).reshape(-1, 2),
        samples=_gather_samples(rows),
        scored_rows=np.array(scored, dtype=np.int32),
        scored_ids=np.concatenate([_successor_ids(rows[index]) for index in scored]) if scored else NO_IDS,
    )


def _query_ids(row: ScheduledRow) -> Ints:
    start = row.sequence.num_computed_tokens
    return row.sequence.token_ids[start : start + row.num_query_tokens]


def _successor_ids(row: ScheduledRow) -> Ints:
    """For each query token the prompt id after it; -1 after the last one of the prompt."""
    start = row.sequence.num_computed_tokens + 1
    prompt_ids = row.sequence.token_ids[: row.group.num_prompt_tokens]
    known = prompt_ids[start : start + row.num_query_tokens]
    successors = np.full(row.num_query_tokens, -1, dtype=np.int32)
    successors[: len(known)] = known
    return successors


@dataclass(frozen=True, slots=True)
class _Draw:
    """One token to be drawn: for which choice, from which row."""

    row_index: int
    group: SequenceGroup
    sequence: Sequence
    choice: int

    @property
    def params(self) -> SamplingParams:
        return self.group.request.sampling

    @property
    def mark(self) -> WatermarkParams | None:
        return self.group.request.sampling.watermark

    @property
    def seed(self) -> int:
        return (self.params.seed + self.choice) & SEED_MASK

    def history(self) -> Ints:
        """The ids so far, where a processor looks at them."""
        needs_history = self.params.repetition_penalty != 1.0 or self.params.frequency_penalty != 0.0
        return self.sequence.token_ids if needs_history else NO_IDS

    def banned_ids(self) -> Ints:
        """The ids that would end the choice too early."""
        is_short = self.group.num_generated(self.sequence) < self.group.request.min_new_tokens
        return np.array(self.group.request.stop_token_ids, dtype=np.int32) if is_short else NO_IDS


def _gather_samples(rows: list[ScheduledRow]) -> SamplingColumns:
    draws = [
        _Draw(index, row.group, row.sequence, choice)
        for index, row in enumerate(rows)
        if row.reaches_end
        for choice in row.sequence.choices
    ]
    history_ids, history_starts = _pack([draw.history() for draw in draws])
    banned_ids, banned_starts = _pack([draw.banned_ids() for draw in draws])
    return SamplingColumns(
        rows_S=np.array([draw.row_index for draw in draws], dtype=np.int32),
        positions_S=np.array([draw.sequence.num_tokens for draw in draws], dtype=np.int32),
        seeds_S=np.array([draw.seed for draw in draws], dtype=np.uint64),
        do_sample_S=np.array([draw.params.do_sample for draw in draws], dtype=np.bool_),
        temperature_S=np.array([draw.params.temperature for draw in draws], dtype=np.float32),
        top_k_S=np.array([draw.params.top_k for draw in draws], dtype=np.int32),
        top_p_S=np.array([draw.params.top_p for draw in draws], dtype=np.float32),
        typical_p_S=np.array([draw.params.typical_p for draw in draws], dtype=np.float32),
        repetition_penalty_S=np.array([draw.params.repetition_penalty for draw in draws], dtype=np.float32),
        frequency_penalty_S=np.array([draw.params.frequency_penalty for draw in draws], dtype=np.float32),
        watermark_gamma_S=np.array([draw.mark.gamma if draw.mark else 0.0 for draw in draws], dtype=np.float32),
        watermark_delta_S=np.array([draw.mark.delta if draw.mark else 0.0 for draw in draws], dtype=np.float32),
        watermark_key_S=np.array([draw.mark.key if draw.mark else 0 for draw in draws], dtype=np.uint64),
        top_n_S=np.array([draw.group.request.top_n for draw in draws], dtype=np.int32),
        history_ids=history_ids,
        history_starts=history_starts,
        banned_ids=banned_ids,
        banned_starts=banned_starts,
    )


def _pack(parts: list[Ints]) -> tuple[Ints, Longs]:
    """The parts end to end, and where each starts, with the end as a last entry."""
    starts = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum([len(part) for part in parts], out=starts[1:])
    return (np.concatenate(parts) if parts else NO_IDS), starts
