"""Gathers the scheduled rows into one step's plan: values of sequences become columns of numpy arrays."""

from __future__ import annotations

import numpy as np

from gyrfalcon.engine.interface import SamplingParams
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


def _gather_samples(rows: list[ScheduledRow]) -> SamplingColumns:
    draws = [
        (index, row.group, row.sequence, choice)
        for index, row in enumerate(rows)
        if row.reaches_end
        for choice in row.sequence.choices
    ]
    params = [group.request.sampling for _, group, _, _ in draws]
    marks = [p.watermark for p in params]
    history_ids, history_starts = _pack([_history(p, sequence) for p, (_, _, sequence, _) in zip(params, draws)])
    banned_ids, banned_starts = _pack([_banned_ids(group, sequence) for _, group, sequence, _ in draws])
    return SamplingColumns(
        rows_S=np.array([index for index, _, _, _ in draws], dtype=np.int32),
        positions_S=np.array([sequence.num_tokens for _, _, sequence, _ in draws], dtype=np.int32),
        seeds_S=np.array(
            [(p.seed + choice) & SEED_MASK for p, (_, _, _, choice) in zip(params, draws)], dtype=np.uint64
        ),
        do_sample_S=np.array([p.do_sample for p in params], dtype=np.bool_),
        temperature_S=np.array([p.temperature for p in params], dtype=np.float32),
        top_k_S=np.array([p.top_k for p in params], dtype=np.int32),
        top_p_S=np.array([p.top_p for p in params], dtype=np.float32),
        typical_p_S=np.array([p.typical_p for p in params], dtype=np.float32),
        repetition_penalty_S=np.array([p.repetition_penalty for p in params], dtype=np.float32),
        frequency_penalty_S=np.array([p.frequency_penalty for p in params], dtype=np.float32),
        watermark_gamma_S=np.array([m.gamma if m else 0.0 for m in marks], dtype=np.float32),
        watermark_delta_S=np.array([m.delta if m else 0.0 for m in marks], dtype=np.float32),
        watermark_key_S=np.array([m.key if m else 0 for m in marks], dtype=np.uint64),
        top_n_S=np.array([group.request.top_n for _, group, _, _ in draws], dtype=np.int32),
        history_ids=history_ids,
        history_starts=history_starts,
        banned_ids=banned_ids,
        banned_starts=banned_starts,
    )


def _history(params: SamplingParams, sequence: Sequence) -> Ints:
    needs_history = params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0
    return sequence.token_ids if needs_history else NO_IDS


def _banned_ids(group: SequenceGroup, sequence: Sequence) -> Ints:
    request = group.request
    too_short = group.num_generated(sequence) < request.min_new_tokens
    return np.array(request.stop_token_ids, dtype=np.int32) if too_short else NO_IDS


def _pack(parts: list[Ints]) -> tuple[Ints, Longs]:
    """The parts end to end, and where each starts, with the end as a last entry."""
    starts = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum([len(part) for part in parts], out=starts[1:])
    return (np.concatenate(parts) if parts else NO_IDS), starts
