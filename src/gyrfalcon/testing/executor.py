"""An executor without a model: its cache holds token ids, and its next token is a hash of what a row can see there.

A wrong block table, a missed copy or a stale prefix therefore changes the output, as it would with a real cache.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable

import numpy as np

from gyrfalcon.engine.core import CoreLimits, EngineCore
from gyrfalcon.runner.interface import (
    NOTHING_LEFT,
    ExecutorFacts,
    ProposedTokens,
    SamplingColumns,
    StepPlan,
    StepResult,
)

UNWRITTEN = -7


class FakeExecutor:
    """Executor of a made-up model. `before_step` may raise, to play a failing device."""

    def __init__(
        self,
        *,
        num_blocks: int = 32,
        block_size: int = 4,
        vocab_size: int = 100,
        max_context: int = 1000,
        can_run_ahead: bool = False,
        before_step: Callable[[StepPlan], None] = lambda plan: None,
    ) -> None:
        self.facts = ExecutorFacts(
            vocab_size=vocab_size,
            max_context=max_context,
            num_blocks=num_blocks,
            block_size=block_size,
            cache_bytes=num_blocks * block_size * 8,
            weight_bytes=0,
            num_parameters=0,
            dtype="float32",
            device="cpu",
            can_run_ahead=can_run_ahead,
        )
        self._cache = np.full((num_blocks, block_size), UNWRITTEN, dtype=np.int32)
        self._before_step = before_step
        self.plans: list[StepPlan] = []
        self._plan: StepPlan

    def execute(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        self._before_step(plan)
        result = self._run(plan)
        ahead: list[StepResult] = []
        for _ in range(plan.num_ahead):
            newest = ahead[-1] if ahead else result
            plan = dataclasses.replace(
                plan, context_lens_R=plan.context_lens_R + 1, token_ids_T=newest.token_ids_S.copy()
            )
            ahead.append(self._run(plan))
        return dataclasses.replace(result, ahead=tuple(ahead))

    def _run(self, plan: StepPlan) -> StepResult:
        block_size = self.facts.block_size
        sources, targets = plan.block_copies_C2.T
        self._cache[targets] = self._cache[sources]
        start = 0
        for row, length in enumerate(plan.query_lens_R.tolist()):
            positions = np.arange(length) + plan.context_lens_R[row]
            blocks = plan.block_tables_RW[row, positions // block_size]
            self._cache[blocks, positions % block_size] = plan.token_ids_T[start : start + length]
            start += length
        self._plan = plan
        scored = plan.scored_ids
        return dataclasses.replace(
            self.choose(plan.samples),
            scored_logprobs=np.where(scored < 0, np.nan, -scored / 8).astype(np.float32),
        )

    def choose(self, samples: SamplingColumns) -> StepResult:
        token_ids, proposed = [], []
        for sample, (row, back, seed, does_sample, count) in enumerate(
            zip(
                samples.rows_S,
                samples.tokens_back_S,
                samples.seeds_S,
                samples.do_sample_S,
                samples.num_candidates_S,
                strict=True,
            )
        ):
            banned = samples.banned.ids[samples.banned.starts[sample] : samples.banned.starts[sample + 1]]
            visible = self._visible(self._plan, int(row), int(back))
            token_id = fake_token(visible, int(seed) if does_sample else 0, self.facts.vocab_size)
            left = (np.arange(self.facts.vocab_size) + token_id) % self.facts.vocab_size
            left = left[~np.isin(left, banned)]
            token_id = int(left[0]) if left.size else NOTHING_LEFT
            token_ids.append(token_id)
            proposed.append((token_id + np.arange(count)) % self.facts.vocab_size)
        counts = samples.num_candidates_S.astype(np.int64)
        scores = np.concatenate([-(np.arange(count) + 1) / 8 for count in counts] or [np.empty(0)])
        return StepResult(
            token_ids_S=np.array(token_ids, dtype=np.int32),
            logprobs_S=np.array([-token_id / 8 for token_id in token_ids], dtype=np.float32),
            top_ids=np.empty(0, dtype=np.int32),
            top_logprobs=np.empty(0, dtype=np.float32),
            top_starts=np.zeros(len(token_ids) + 1, dtype=np.int64),
            scored_logprobs=np.empty(0, dtype=np.float32),
            proposed=ProposedTokens(
                ids=np.concatenate(proposed).astype(np.int32) if proposed else np.empty(0, dtype=np.int32),
                scores=scores.astype(np.float32),
                keys=scores.astype(np.float64),
                starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            ),
        )

    def close(self) -> None:
        pass

    def _visible(self, plan: StepPlan, row: int, tokens_back: int) -> list[int]:
        length = int(plan.context_lens_R[row] + plan.query_lens_R[row]) - tokens_back
        visible: list[int] = self._cache[plan.block_tables_RW[row]].reshape(-1)[:length].tolist()
        return visible


def fake_token(visible: list[int], seed: int, vocab_size: int) -> int:
    """The token a FakeExecutor draws after these ids: the oracle of tests."""
    return zlib.crc32(np.array([*visible, seed], dtype=np.uint64).tobytes()) % vocab_size


def fake_continuation(prompt_ids: tuple[int, ...], num_tokens: int, seed: int = 0, vocab_size: int = 100) -> list[int]:
    """What a FakeExecutor generates after a prompt, without any engine."""
    ids = list(prompt_ids)
    for _ in range(num_tokens):
        ids.append(fake_token(ids, seed, vocab_size))
    return ids[len(prompt_ids) :]


def build_fake_core(on_progress: Callable[[int, int], None]) -> EngineCore:
    """A core over a FakeExecutor, picklable for a child process."""
    on_progress(1, 1)
    return EngineCore(FakeExecutor(num_blocks=200), CoreLimits(token_budget=64, max_rows=8))
