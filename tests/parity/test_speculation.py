"""Speculation on tiny checkpoints: every event is bit for bit what it is without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from gyrfalcon.engine.core import CoreLimits, EngineCore, StepOutcome
from gyrfalcon.engine.interface import EngineRequest, EngineStats, SamplingParams, TokenEvent, WatermarkParams
from gyrfalcon.kernels.select import select_ops
from gyrfalcon.models.decoder import CausalLM
from gyrfalcon.models.registry import load_model
from gyrfalcon.runner.model_runner import ModelRunner
from tests.kernels.native import needs_kernels

BLOCK_SIZE = 8
PROMPTS = (
    "The falcon climbs above the river. The falcon climbs above",
    "3 birds, 14 feathers, 3 birds, 14 feathers, 3 birds,",
    "A stoop begins high; the wings are folded. " * 4,
    "Z",
)
SETTINGS = (
    SamplingParams(),
    SamplingParams(repetition_penalty=1.1, frequency_penalty=0.1),
    SamplingParams(no_repeat_ngram_size=6, bad_words_ids=((40, 41), (32,))),
    SamplingParams(watermark=WatermarkParams(context_width=3)),
    SamplingParams(do_sample=True, temperature=0.6),
    SamplingParams(do_sample=True, temperature=0.8, top_k=20, top_p=0.9),
    SamplingParams(do_sample=True, typical_p=0.9, exponential_decay_length_penalty=(10, 1.02)),
    SamplingParams(encoder_repetition_penalty=1.2, suppress_tokens=(50,), sequence_bias=(((60, 61), 2.0),)),
)


def run(
    model: CausalLM, wanted: list[EngineRequest], limits: CoreLimits
) -> tuple[dict[str, list[object]], EngineStats]:
    """What each request is told of each choice, and how the engine stood at the end."""
    core = EngineCore(ModelRunner(model, "cpu", num_blocks=26, block_size=BLOCK_SIZE), limits)
    told: dict[str, list[object]] = {}
    for one in wanted:
        core.submit(one, StepOutcome())
    while core.has_work:
        outcome = StepOutcome()
        core.step(outcome)
        assert not outcome.failures
        for name, events in outcome.events.items():
            for event in events:
                key, value = (
                    (f"{name}/{event.choice}", event) if isinstance(event, TokenEvent) else (name, event.logprobs)
                )
                told.setdefault(key, []).append(value)
    return told, core.stats()


@pytest.mark.parametrize(
    ("form", "dtype", "is_native"),
    [
        ("falcon-7b", "float32", False),
        ("falcon-rw", "float32", False),
        ("llama", "float32", False),
        pytest.param("falcon-7b", "bfloat16", True, marks=needs_kernels),
        pytest.param("llama", "float32", True, marks=needs_kernels),
    ],
)
def test_every_event_is_what_it_is_without(
    form: str, dtype: str, is_native: bool, checkpoint: Callable[..., Path]
) -> None:
    folder = checkpoint(form, trained=True)
    ops = select_ops("cpu", block_size=BLOCK_SIZE, num_threads=2) if is_native else select_ops("cpu")
    model = load_model(folder, dtype=dtype, device="cpu", ops=ops)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted = [
        EngineRequest(
            request_id=f"{place}-{index}",
            prompt_ids=tuple(tokenizer(prompt).input_ids),
            max_new_tokens=30 + 10 * place,
            min_new_tokens=5,
            stop_token_ids=(0, 14),
            num_choices=3 if settings.do_sample and place == 0 else 1,
            sampling=settings,
            prompt_logprobs=index == 1,
            top_n=index % 3,
        )
        for place, prompt in enumerate(PROMPTS)
        for index, settings in enumerate(SETTINGS)
    ]
    alone, _ = run(model, wanted, CoreLimits(token_budget=40, max_rows=16))
    # No cost is assumed for a step's tokens, so that every draft there is runs.
    limits = CoreLimits(token_budget=40, max_rows=16, max_draft_tokens=6, step_cost_tokens=1000)
    ahead, stats = run(model, wanted, limits)
    assert ahead == alone
    assert stats.num_preemptions > 0
    assert stats.accepted_tokens > 0.1 * stats.decode_tokens
