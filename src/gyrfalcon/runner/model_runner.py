"""Runs a step on one device: plan -> batch -> forward -> logits of the wanted positions -> processors -> sampler."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gyrfalcon.faults import Fault, planned_fault
from gyrfalcon.footprint import num_cache_blocks
from gyrfalcon.kernels.cpu.threads import choose_num_threads
from gyrfalcon.kernels.select import select_ops
from gyrfalcon.memory import free_bytes
from gyrfalcon.models.decoder import CausalLM
from gyrfalcon.models.registry import load_model
from gyrfalcon.runner.batch import ForwardBatch, make_batch
from gyrfalcon.runner.choosing import RowLogits, choose_or_propose, tokens_alone
from gyrfalcon.runner.interface import ExecutorFacts, Floats, Ints, SamplingColumns, StepPlan, StepResult
from gyrfalcon.runner.kv_cache import CacheShape, allocate_cache

logger = logging.getLogger(__name__)

SCORED_AT_ONCE = 64
"""Prompt positions whose logits exist together while a prompt is scored: bounds the memory at this times V floats."""


class ModelRunner:
    """An Executor over one model on one device."""

    def __init__(
        self, model: CausalLM, device: str, *, num_blocks: int, block_size: int, fault: Fault | None = None
    ) -> None:
        """num_blocks: of the cache, the padding block included. fault: what is to go wrong, in tests."""
        self._model = model
        self._fault = fault
        self._device = torch.device(device)
        self._ops = select_ops(device)
        shape = cache_shape(model, block_size)
        self._caches = allocate_cache(shape, num_blocks, device)
        self._kept: RowLogits | None = None
        self.facts = ExecutorFacts(
            vocab_size=model.spec.vocab_size,
            max_context=model.spec.max_context,
            num_blocks=num_blocks,
            block_size=block_size,
            cache_bytes=num_blocks * shape.block_bytes,
            weight_bytes=model.weight_bytes,
            num_parameters=model.num_parameters,
            dtype=str(model.dtype).removeprefix("torch."),
            device=device,
            can_run_ahead=fault is None,
        )

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        started_s = time.perf_counter()
        if self._fault is not None:
            self._fault.strike(plan.token_ids_T)
        batch = make_batch(plan, self.facts.block_size, self._device)
        self._copy_blocks(plan)
        if self._is_plain(plan):
            return self._choose_next(plan, batch, started_s)
        hidden_TD = self._model.forward(self._to_device(batch.ids_T), batch.attention, self._caches)
        forward_end_s = time.perf_counter()
        logits = self._wanted_logits(plan, batch, hidden_TD)
        self._kept = logits if len(plan.kept_rows) else None
        result = choose_or_propose(logits, plan.samples, self._model.choose_greedy)
        return dataclasses.replace(
            result,
            scored_logprobs=self._score_prompts(plan, batch, hidden_TD),
            forward_s=forward_end_s - started_s,
            sample_s=time.perf_counter() - forward_end_s,
        )

    @torch.inference_mode()
    def choose(self, samples: SamplingColumns) -> StepResult:
        assert self._kept is not None, "the last plan kept no rows"
        return choose_or_propose(self._kept, samples, self._model.choose_greedy)

    def close(self) -> None:
        self._caches = []
        self._kept = None

    def _to_device(self, values: Ints) -> Tensor:
        return torch.from_numpy(values).to(self._device, torch.int64)

    def _copy_blocks(self, plan: StepPlan) -> None:
        if len(plan.block_copies_C2):
            sources_C, targets_C = self._to_device(plan.block_copies_C2).unbind(1)
            for cache in self._caches:
                self._ops.copy_blocks(cache, sources_C, targets_C)

    def _is_plain(self, plan: StepPlan) -> bool:
        """Whether the likeliest tokens are all that is asked for; of a step to be spoilt they are not."""
        asks_more = len(plan.kept_rows) or len(plan.scored_rows) or self._fault is not None
        return not asks_more and bool(plan.samples.is_plain_S.all())

    def _choose_next(self, plan: StepPlan, batch: ForwardBatch, started_s: float) -> StepResult:
        """The same as the long way gives, without anything of it coming to light but the tokens."""
        tokens_S = batch.last_tokens_R[plan.samples.rows_S] - plan.samples.tokens_back_S
        self._kept = None
        ids_AS, logprobs_AS = self._model.choose_next(
            batch.ids_T, batch.attention, self._caches, tokens_S, plan.num_ahead
        )
        first, *ahead = map(tokens_alone, ids_AS, logprobs_AS)
        return dataclasses.replace(first, forward_s=time.perf_counter() - started_s, ahead=tuple(ahead))

    def _wanted_logits(self, plan: StepPlan, batch: ForwardBatch, hidden_TD: Tensor) -> RowLogits:
        """Logits of the tokens that something is drawn after, now or later; once, however often that is."""
        last_tokens_R = batch.last_tokens_R
        drawn_S = last_tokens_R[plan.samples.rows_S] - plan.samples.tokens_back_S
        tokens_N = drawn_S
        if len(plan.kept_rows) or (drawn_S[1:] <= drawn_S[:-1]).any():
            tokens_N = np.union1d(drawn_S, last_tokens_R[plan.kept_rows])
        hidden_ND = hidden_TD
        if len(tokens_N) < len(hidden_TD):
            hidden_ND = hidden_TD[torch.from_numpy(tokens_N).to(self._device)]
        logits_NV = self._model.logits(hidden_ND)
        ids_N = plan.token_ids_T[tokens_N]
        if self._fault is not None and (spoilt_N := self._fault.spoils(ids_N)).any():
            logits_NV[torch.from_numpy(spoilt_N).to(self._device)] = torch.nan
        return RowLogits(last_tokens_R, tokens_N, logits_NV, ids_N)

    def _score_prompts(self, plan: StepPlan, batch: ForwardBatch, hidden_TD: Tensor) -> Floats:
        """Log-probability of each scored id under the raw logits of the token before it; NaN where there is none."""
        if not len(plan.scored_rows):
            return np.empty(0, dtype=np.float32)
        starts = batch.attention.query_starts
        tokens = np.concatenate([np.arange(starts[row], starts[row + 1]) for row in plan.scored_rows])
        logprobs = np.full(len(tokens), np.nan, dtype=np.float32)
        known = np.flatnonzero(plan.scored_ids >= 0)
        for start in range(0, len(known), SCORED_AT_ONCE):
            some = known[start : start + SCORED_AT_ONCE]
            hidden = hidden_TD[torch.from_numpy(tokens[some]).to(self._device)]
            ids = torch.from_numpy(plan.scored_ids[some].astype(np.int64)).to(self._device)
            scores = torch.log_softmax(self._model.logits(hidden), dim=-1).gather(1, ids[:, None])
            logprobs[some] = scores.squeeze(1).cpu().numpy()
        return logprobs


def cache_shape(model: CausalLM, block_size: int) -> CacheShape:
    """What the model's cache costs in blocks of `block_size` tokens."""
    spec = model.spec
    return CacheShape(
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        block_size=block_size,
        dtype=model.cache_dtype,
    )


def load_runner(
    folder: Path,
    *,
    dtype: str,
    device: str,
    quantize: str | None,
    block_size: int,
    max_rows: int,
    max_total_tokens: int | None,
    cache_tokens: int | None,
    cache_bytes: int | None,
    cache_fraction: float,
    num_threads: int | None,
    keeps_packed: bool,
    packed_directory: Path | None,
    on_progress: Callable[[int, int], None],
) -> ModelRunner:
    """Load a checkpoint and give it a cache.

    num_threads: on CPU; None for what fits the model. keeps_packed: whether packed weights are kept for the next start;
    packed_directory: there, or None for beside the checkpoint, else in the user's cache.

    The other arguments are those of `footprint.num_cache_blocks`. Raises ModelLoadError, OutOfCache.
    """
    ops = select_ops(device, block_size=block_size, num_threads=num_threads)
    model = load_model(
        folder,
        dtype=dtype,
        device=device,
        ops=ops,
        quantize=quantize,
        keeps_packed=keeps_packed,
        packed_directory=packed_directory,
        on_progress=on_progress,
    )
    if device == "cpu":
        torch.set_num_threads(choose_num_threads(num_threads, model.weight_bytes))
    num_blocks = num_cache_blocks(
        model.spec,
        dtype=str(model.cache_dtype).removeprefix("torch."),
        block_size=block_size,
        free_bytes=_free_bytes(device),
        where=device,
        max_rows=max_rows,
        max_total_tokens=max_total_tokens,
        cache_tokens=cache_tokens,
        cache_bytes=cache_bytes,
        cache_fraction=cache_fraction,
    )
    runner = ModelRunner(
        model, device, num_blocks=num_blocks + 1, block_size=block_size, fault=planned_fault(os.environ)
    )
    logger.info("kv cache: %d blocks of %d tokens, %.1f MiB", num_blocks, block_size, runner.facts.cache_bytes / 2**20)
    return runner


def _free_bytes(device: str) -> int:
    if device == "cpu":
        return free_bytes()
    return int(torch.cuda.mem_get_info()[0])
