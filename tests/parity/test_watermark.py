"""The watermark against transformers: its detector's statistics, and marked generation token for token.

Transformers draws green lists from torch's generator. Fed with ours, its processor and its detector are the oracle.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    PreTrainedConfig,
    WatermarkDetector,
    WatermarkingConfig,
    WatermarkLogitsProcessor,
)

from gyrfalcon.engine.core import CoreLimits, EngineCore
from gyrfalcon.engine.interface import BeamParams, EngineRequest, SamplingParams, WatermarkParams
from gyrfalcon.kernels.select import select_ops
from gyrfalcon.models.registry import load_model
from gyrfalcon.runner.model_runner import ModelRunner
from gyrfalcon.service.interface import DetectCall, Detection, TokenPrompt
from gyrfalcon.service.tokenizer import load_tokenizer
from gyrfalcon.service.watermark import detect
from gyrfalcon.splitmix import are_green
from gyrfalcon.testing.collector import Collector

MARK = WatermarkParams(gamma=0.25, delta=3.0, key=2**61 + 5)
PROMPTS = ((5, 9, 200), (17,), (31, 4, 4, 8, 90, 120, 7))
NUM_NEW = 80


def green_list(mark: WatermarkParams, vocab_size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """What replaces `_get_greenlist_ids`: the green ids after the last of some ids."""

    def ids_of(input_ids: torch.Tensor) -> torch.Tensor:
        flags = are_green(mark.key, mark.gamma, np.full(vocab_size, int(input_ids[-1])), np.arange(vocab_size))
        return torch.from_numpy(np.flatnonzero(flags))

    return ids_of


@pytest.fixture(scope="module")
def subject(checkpoint: Callable[..., Path]) -> tuple[Path, Any, Any]:
    folder = checkpoint("falcon-7b")
    model = load_model(folder, dtype="float32", device="cpu", ops=select_ops("cpu"))
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    oracle.generation_config.eos_token_id = None
    return folder, model, oracle


def run(model: Any, requests: list[EngineRequest]) -> Collector:
    runner = ModelRunner(model, "cpu", num_blocks=400, block_size=8)
    collector = Collector(EngineCore(runner, CoreLimits(token_budget=64, max_rows=16)))
    for request in requests:
        collector.submit(request)
    collector.run(most_steps=20_000)
    assert not collector.failures
    return collector


def find(folder: Path, ids: list[int], prompt: tuple[int, ...] | None = None, **call: Any) -> Detection:
    return detect(
        DetectCall(text=TokenPrompt(tuple(ids)), prompt=TokenPrompt(prompt) if prompt else None, **call),
        model="tiny",
        tokenizer=load_tokenizer(folder),
        num_ids=2**31,
        settings=MARK,
    )


@pytest.mark.parametrize("ignore_repeated", [True, False])
@pytest.mark.parametrize("vocab_size", [12, 300])
def test_the_detector_s_statistics_are_transformers(
    checkpoint: Callable[..., Path], vocab_size: int, ignore_repeated: bool
) -> None:
    config = WatermarkingConfig(greenlist_ratio=MARK.gamma, bias=MARK.delta)
    oracle = WatermarkDetector(
        model_config=PreTrainedConfig(vocab_size=vocab_size, bos_token_id=vocab_size),
        device="cpu",
        watermarking_config=config,
        ignore_repeated_ngrams=ignore_repeated,
    )
    oracle.processor._get_greenlist_ids = green_list(MARK, vocab_size)
    rng = random.Random(vocab_size)
    for length in (2, 30, 150):
        ids = rng.choices(range(vocab_size), k=length)
        wanted = oracle(torch.tensor([ids]), return_dict=True)
        found = find(checkpoint("falcon-7b"), ids, ignore_repeated=ignore_repeated)
        (score,) = found.keys
        assert found.num_scored == wanted.num_tokens_scored[0]
        assert score.num_green == wanted.num_green_tokens[0]
        assert score.green_fraction == wanted.green_fraction[0]
        assert score.z_score == pytest.approx(wanted.z_score[0])
        if length == 150 and vocab_size == 300:
            # Transformers takes the normal distribution's tail, which the exact one is near where texts are long.
            assert score.p_value == pytest.approx(wanted.p_value[0], abs=0.05)


@pytest.mark.parametrize("num_beams", [1, 4])
def test_marked_tokens_are_those_of_transformers(subject: tuple[Path, Any, Any], num_beams: int) -> None:
    folder, model, oracle = subject
    processor = WatermarkLogitsProcessor(oracle.config.vocab_size, "cpu", greenlist_ratio=MARK.gamma, bias=MARK.delta)
    processor._get_greenlist_ids = green_list(MARK, oracle.config.vocab_size)
    collector = run(
        model,
        [
            EngineRequest(
                request_id=str(index),
                prompt_ids=prompt,
                max_new_tokens=NUM_NEW,
                sampling=SamplingParams(watermark=MARK),
                beams=BeamParams(num_beams=num_beams) if num_beams > 1 else None,
            )
            for index, prompt in enumerate(PROMPTS)
        ],
    )
    for index, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            whole = oracle.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NUM_NEW,
                do_sample=False,
                num_beams=num_beams,
                pad_token_id=0,
                logits_processor=LogitsProcessorList([processor]),
            )
        tokens = collector.tokens[str(index)][0]
        assert tokens == whole[0, len(prompt) :].tolist()
        # The context of the first token is the prompt's last: all new tokens are scored.
        assert find(folder, tokens, prompt, ignore_repeated=False).num_scored == NUM_NEW


@pytest.mark.parametrize(
    ("sampling", "beams"),
    [
        (SamplingParams(), None),
        (SamplingParams(do_sample=True, seed=3), None),
        (SamplingParams(do_sample=True, seed=4, temperature=0.7, top_k=50, top_p=0.95), None),
        (SamplingParams(do_sample=True, seed=5, typical_p=0.9, min_p=0.001, repetition_penalty=1.2), None),
        (SamplingParams(repetition_penalty=1.5, frequency_penalty=1.0, no_repeat_ngram_size=3), None),
        (SamplingParams(renormalize_logits=True), BeamParams(num_beams=4)),
        (SamplingParams(do_sample=True, seed=6, temperature=1.3), BeamParams(num_beams=3)),
        (SamplingParams(), BeamParams(num_beams=4, num_beam_groups=2, diversity_penalty=0.7)),
    ],
    ids=["greedy", "sampling", "top-k", "typical", "penalties", "beams", "beam sampling", "diverse beams"],
)
def test_the_mark_is_found_in_every_choice_of_every_mode_and_nowhere_else(
    subject: tuple[Path, Any, Any], sampling: SamplingParams, beams: BeamParams | None
) -> None:
    folder, model, _ = subject
    requests = [
        EngineRequest(
            request_id=name,
            prompt_ids=PROMPTS[0],
            max_new_tokens=NUM_NEW,
            num_choices=3 if sampling.do_sample or beams else 1,
            sampling=msgspec.structs.replace(sampling, watermark=mark),
            beams=beams,
        )
        for name, mark in (("marked", MARK), ("unmarked", None))
    ]
    collector = run(model, requests)
    for tokens in collector.tokens["marked"]:
        assert find(folder, tokens, PROMPTS[0], alpha=1e-2, ignore_repeated=False).is_found
        assert not find(folder, tokens, PROMPTS[0], alpha=1e-3, keys=(MARK.key + 1, MARK.key - 1)).is_found
    for tokens in collector.tokens["unmarked"]:
        assert not find(folder, tokens, PROMPTS[0], alpha=1e-3).is_found


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_wider_context_marks_every_token_by_the_tokens_before_it(
    subject: tuple[Path, Any, Any], num_beams: int
) -> None:
    folder, model, _ = subject
    mark = WatermarkParams(gamma=0.5, delta=60.0, key=11, context_width=3)
    for prompt in PROMPTS:
        request = EngineRequest(
            request_id="a",
            prompt_ids=prompt,
            max_new_tokens=NUM_NEW,
            sampling=SamplingParams(watermark=mark),
            beams=BeamParams(num_beams=num_beams) if num_beams > 1 else None,
        )
        ids = run(model, [request]).tokens["a"][0]
        known = DetectCall(text=TokenPrompt(tuple(ids)), prompt=TokenPrompt(prompt))
        unknown = DetectCall(text=TokenPrompt(tuple(ids)))
        found, cut, narrow = (
            detect(call, model="tiny", tokenizer=load_tokenizer(folder), num_ids=2**31, settings=settings)
            for call, settings in (
                (known, mark),
                (unknown, mark),
                (known, msgspec.structs.replace(mark, context_width=1)),
            )
        )
        # A delta beyond every gap leaves no token that is not green, from the first on.
        assert all(found.keys[0].green)
        assert cut.keys[0].green == (None, None, None, *found.keys[0].green[3:])
        assert not all(narrow.keys[0].green)
