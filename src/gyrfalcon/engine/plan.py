"""Gathers the scheduled rows into one step's plan: values of sequences become columns of numpy arrays."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np

from gyrfalcon.engine import sampling_record, token_rules
from gyrfalcon.engine.interface import WatermarkParams
from gyrfalcon.engine.scheduler import ScheduledRow
from gyrfalcon.engine.sequence import Sequence, SequenceGroup
from gyrfalcon.engine.token_rules import NO_WEIGHTS
from gyrfalcon.runner.interface import NO_IDS, Floats, IdLists, Ints, SamplingColumns, StepPlan, WeightedIdLists

NO_COPIES: Ints = np.empty((0, 2), dtype=np.int32)


def gather_plan(rows: list[ScheduledRow], num_ahead: int = 0) -> StepPlan:
    """The plan of one step. A row that reaches its end draws one token for every choice it carries.

    With a draft it also draws one after each of the draft's tokens, as if the text were that long.
    num_ahead: further steps, as `Scheduler.make_room_ahead` allowed them.
    """
    widest = max(len(row.sequence.blocks) for row in rows)
    block_tables_RW = np.zeros((len(rows), widest), dtype=np.int32)
    for index, row in enumerate(rows):
        block_tables_RW[index, : len(row.sequence.blocks)] = row.sequence.blocks
    copies = [pair for row in rows for pair in row.block_copies]
    kept = [index for index, row in enumerate(rows) if row.group.search and row.group.search.num_waves > 1]
    scored = [index for index, row in enumerate(rows) if row.group.scores_prompt]
    return StepPlan(
        query_lens_R=np.array([row.num_query_tokens + len(row.draft_ids) for row in rows], dtype=np.int32),
        context_lens_R=np.array([row.sequence.num_computed_tokens for row in rows], dtype=np.int32),
        token_ids_T=np.concatenate([_query_ids(row) for row in rows]),
        block_tables_RW=block_tables_RW,
        block_copies_C2=np.array(copies, dtype=np.int32) if copies else NO_COPIES,
        samples=gather_samples([draw for index, row in enumerate(rows) for draw in first_draws(index, row)]),
        kept_rows=np.array(kept, dtype=np.int32) if kept else NO_IDS,
        scored_rows=np.array(scored, dtype=np.int32) if scored else NO_IDS,
        scored_ids=np.concatenate([_successor_ids(rows[index]) for index in scored]) if scored else NO_IDS,
        num_ahead=num_ahead,
    )


def _query_ids(row: ScheduledRow) -> Ints:
    start = row.sequence.num_computed_tokens
    known_ids = row.sequence.token_ids[start : start + row.num_query_tokens]
    return np.concatenate([known_ids, row.draft_ids]) if len(row.draft_ids) else known_ids


def _successor_ids(row: ScheduledRow) -> Ints:
    """For each query token the prompt id after it; -1 after the last one of the prompt."""
    start = row.sequence.num_computed_tokens + 1
    prompt_ids = row.sequence.token_ids[: row.group.num_prompt_tokens]
    known = prompt_ids[start : start + row.num_query_tokens]
    successors = np.full(row.num_query_tokens, -1, dtype=np.int32)
    successors[: len(known)] = known
    return successors


@dataclass(frozen=True, slots=True)
class Draw:
    """What is to be drawn from a row: one token for one choice, or a beam's candidates."""

    row_index: int
    group: SequenceGroup
    text: Ints  # the ids before the token to be drawn
    choice: int
    num_tokens_back: int = 0  # tokens of a draft that the row runs beyond the text
    num_candidates: int = 0  # of a beam; 0 for a choice's one token
    chosen_before: tuple[tuple[int, int], ...] = ()  # ids that earlier beam groups chose in this step, and how often

    @property
    def mark(self) -> WatermarkParams | None:
        return self.group.request.sampling.watermark

    def earlier_context(self) -> Ints:
        """What a green list depends on besides the last token, the nearest first."""
        width = self.mark.context_width if self.mark else 1
        return self.text[-width:-1][::-1] if width > 1 else NO_IDS

    def history(self) -> Ints:
        """The ids so far, where a penalty looks at them."""
        return self.text if sampling_record.weighs_history(self.group.request) else NO_IDS

    def diversity(self) -> tuple[Ints, Floats]:
        """The ids chosen before in this step, with their counts."""
        if not self.chosen_before:
            return NO_IDS, NO_WEIGHTS
        ids, counts = zip(*self.chosen_before, strict=True)
        return np.array(ids, dtype=np.int32), np.array(counts, dtype=np.float32)


def first_draws(row_index: int, row: ScheduledRow) -> list[Draw]:
    """The draws of a row that reaches its end: those of a search's first wave; else one for every choice it carries.

    With a draft there is one choice, and a draw for each end that its text may turn out to have.
    """
    if not row.reaches_end:
        return []
    group, sequence = row.group, row.sequence
    if group.search is not None:
        return wave_draws(row_index, group, sequence, 0)
    num_drafted = len(row.draft_ids)
    if num_drafted == 0:
        return [Draw(row_index, group, sequence.token_ids, choice) for choice in sequence.choices]
    text = np.concatenate([sequence.token_ids, row.draft_ids])
    return [
        Draw(row_index, group, text[: len(text) - back], sequence.choices[0], back)
        for back in range(num_drafted, -1, -1)
    ]


def wave_draws(row_index: int, group: SequenceGroup, sequence: Sequence, wave: int) -> list[Draw]:
    """One draw for the beams of the wave that this row carries; beams that share a row share their candidates."""
    assert group.search is not None
    beams = [beam for beam in sequence.choices if beam in group.search.beams_of(wave)]
    counts = tuple(group.search.chosen_before().items())
    num_candidates = group.search.num_candidates(wave)
    return [Draw(row_index, group, sequence.token_ids, beam, 0, num_candidates, counts) for beam in beams[:1]]


def gather_samples(draws: list[Draw]) -> SamplingColumns:
    """The draws' parameters as columns."""
    records = b"".join([draw.group.record for draw in draws])
    columns, reads_text = _columns(records, tuple([draw.choice for draw in draws]))
    # Most steps have no draw that depends on more of its text than the last token: then there is nothing to look up.
    lists = _text_lists(draws) if reads_text else _no_lists(len(draws))
    return SamplingColumns(
        rows_S=np.array([draw.row_index for draw in draws], dtype=np.int32),
        tokens_back_S=np.array([draw.num_tokens_back for draw in draws], dtype=np.int32),
        positions_S=np.array([len(draw.text) for draw in draws], dtype=np.int32),
        num_candidates_S=np.array([draw.num_candidates for draw in draws], dtype=np.int32),
        **columns,
        **lists,
    )


@lru_cache(maxsize=4)
def _columns(records: bytes, choices: tuple[int, ...]) -> tuple[dict[str, Any], bool]:
    """What does not change while the same draws follow one another, and whether one of them reads its text.

    Only read, so all steps of the same draws share them.
    """
    columns, reads_text = sampling_record.columns(records)
    columns["seeds_S"] = columns["seeds_S"] + np.array(choices, dtype=np.uint64)
    return columns, reads_text


def _text_lists(draws: list[Draw]) -> dict[str, Any]:
    """The columns that depend on the draws' texts."""
    requests = [draw.group.request for draw in draws]
    texts = [draw.text for draw in draws]
    lengths = [len(text) for text in texts]
    decays = list(map(token_rules.decay, requests, lengths))
    return {
        "watermark_context": _pack([draw.earlier_context() for draw in draws]),
        "bias": _pack_weighted(list(map(token_rules.biased_ids, requests, texts))),
        "diversity": _pack_weighted([draw.diversity() for draw in draws]),
        "history": _pack([draw.history() for draw in draws]),
        "banned": _pack(list(map(token_rules.banned_ids, requests, texts))),
        "forced": _pack([np.array(ids, dtype=np.int32) for ids in map(token_rules.forced_ids, requests, lengths)]),
        "decaying": _pack(
            [
                np.array(request.stop_token_ids, dtype=np.int32) if rate != 0.0 else NO_IDS
                for request, rate in zip(requests, decays, strict=True)
            ]
        ),
        "decay_S": np.array(decays, dtype=np.float32),
        "suppressed": _pack(list(map(token_rules.suppressed_ids, requests, lengths))),
    }


@cache
def _no_lists(num_samples: int) -> dict[str, Any]:
    """The same columns where no text has a say; only read, so all steps of this many samples share them."""
    nothing = IdLists(NO_IDS, np.zeros(num_samples + 1, dtype=np.int64))
    nothing_weighted = WeightedIdLists(NO_IDS, NO_WEIGHTS, nothing.starts)
    names = ("watermark_context", "history", "banned", "forced", "decaying", "suppressed")
    return {
        **dict.fromkeys(names, nothing),
        "bias": nothing_weighted,
        "diversity": nothing_weighted,
        "decay_S": np.zeros(num_samples, dtype=np.float32),
    }


def _pack(parts: list[Ints]) -> IdLists:
    """The parts end to end, and where each starts, with the end as a last entry."""
    starts = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum([len(part) for part in parts], out=starts[1:])
    return IdLists(np.concatenate(parts) if parts else NO_IDS, starts)


def _pack_weighted(parts: list[tuple[Ints, Floats]]) -> WeightedIdLists:
    lists = _pack([ids for ids, _ in parts])
    weights = np.concatenate([weights for _, weights in parts]) if parts else NO_WEIGHTS
    return WeightedIdLists(lists.ids, weights, lists.starts)
