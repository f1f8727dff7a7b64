"""Whole generations with many parameters at once against transformers' `generate`: greedy and beam search, float32;
and the distribution that beam sampling draws from.
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from gyrfalcon.engine.core import CoreLimits, EngineCore
from gyrfalcon.engine.interface import BeamParams, EngineRequest, SamplingParams
from gyrfalcon.kernels.select import select_ops
from gyrfalcon.models.registry import load_model
from gyrfalcon.runner.model_runner import ModelRunner
from gyrfalcon.testing.checkpoints import cached_checkpoint
from gyrfalcon.testing.collector import Collector

FORMS = ("falcon-7b", "falcon-40b", "falcon-180b", "falcon-11b", "falcon-rw", "llama")
PROMPTS = ("The falcon climbs above the", "3 birds, 14", "Z")
STOP_IDS = (11, 290)
LIKELY_IDS = (19, 32, 265, 270, 290, 300, 320)  # that these models like to write


class Subject:
    def __init__(self, form: str, cache: Path) -> None:
        folder = cached_checkpoint(cache, form, trained=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = load_model(folder, dtype="float32", device="cpu", ops=select_ops("cpu"))
        self.oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        self.prompts = tuple(tuple(tokenizer(prompt).input_ids) for prompt in PROMPTS)

    def run(self, requests: list[EngineRequest]) -> Collector:
        runner = ModelRunner(self.model, "cpu", num_blocks=600, block_size=8)
        collector = Collector(EngineCore(runner, CoreLimits(token_budget=256, max_rows=64)))
        for request in requests:
            collector.submit(request)
        collector.run(most_steps=20_000)
        assert not collector.failures
        return collector


@pytest.fixture(scope="module", params=FORMS)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(request.param, tmp_path_factory.getbasetemp() / "checkpoints")


ids = st.sampled_from(LIKELY_IDS)
PARAMETERS: dict[str, st.SearchStrategy[Any]] = {
    "repetition_penalty": st.sampled_from([0.8, 1.3]),
    "encoder_repetition_penalty": st.sampled_from([0.7, 1.5]),
    "no_repeat_ngram_size": st.integers(1, 3),
    "encoder_no_repeat_ngram_size": st.integers(1, 2),
    "bad_words_ids": st.lists(st.lists(ids, min_size=1, max_size=2), min_size=1, max_size=3),
    "sequence_bias": st.lists(
        st.tuples(st.lists(ids, min_size=1, max_size=2, unique=True), st.sampled_from([-5.0, 3.0])),
        min_size=1,
        max_size=3,
        unique_by=lambda pair: tuple(pair[0]),
    ),
    "suppress_tokens": st.lists(ids, min_size=1, max_size=2, unique=True),
    "begin_suppress_tokens": st.lists(ids, min_size=1, max_size=3, unique=True),
    "forced_eos_token_id": st.sampled_from(STOP_IDS),
    "remove_invalid_values": st.just(True),
    "exponential_decay_length_penalty": st.sampled_from([(3, 1.1), (1, 1.4)]),
    "renormalize_logits": st.just(True),
    "min_new_tokens": st.integers(1, 6),
}


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(sorted(PARAMETERS)), max_size=5, unique=True))
    if "exponential_decay_length_penalty" in names and "remove_invalid_values" in names:
        # The one makes the smallest number of what is banned, the other multiplies that: transformers ends in NaN.
        names.remove("remove_invalid_values")
    return {
        "prompt": draw(st.integers(0, len(PROMPTS) - 1)),
        "max_new_tokens": draw(st.sampled_from([5, 16])),
        "num_beams": draw(st.sampled_from([1, 1, 2, 4])),
        "parameters": {name: draw(PARAMETERS[name]) for name in names},
    }


def engine_request(request_id: str, prompt: tuple[int, ...], case: dict[str, Any]) -> EngineRequest:
    parameters = dict(case["parameters"])
    min_new_tokens = parameters.pop("min_new_tokens", 0)
    spelled = {
        "bad_words_ids": lambda words: tuple(tuple(word) for word in words),
        "sequence_bias": lambda pairs: tuple((tuple(one), bias) for one, bias in pairs),
        "suppress_tokens": tuple,
        "begin_suppress_tokens": tuple,
    }
    sampling = {name: spelled.get(name, lambda value: value)(value) for name, value in parameters.items()}
    if "forced_eos_token_id" in sampling:
        sampling["forced_eos_token_ids"] = (sampling.pop("forced_eos_token_id"),)
    return EngineRequest(
        request_id=request_id,
        prompt_ids=prompt,
        max_new_tokens=case["max_new_tokens"],
        min_new_tokens=min_new_tokens,
        stop_token_ids=STOP_IDS,
        sampling=SamplingParams(**sampling),
        beams=BeamParams(num_beams=case["num_beams"]) if case["num_beams"] > 1 else None,
    )


def transformers_says(
    subject: Subject, prompt: tuple[int, ...], case: dict[str, Any]
) -> tuple[list[int], float | None]:
    parameters = dict(case["parameters"])
    if "sequence_bias" in parameters:
        parameters["sequence_bias"] = [[list(one), bias] for one, bias in parameters["sequence_bias"]]
    tokens = torch.tensor([prompt])
    with torch.inference_mode():
        made = subject.oracle.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=case["max_new_tokens"],
            do_sample=False,
            num_beams=case["num_beams"],
            eos_token_id=list(STOP_IDS),
            pad_token_id=383,
            return_dict_in_generate=True,
            output_scores=True,
            **parameters,
        )
    generated = made.sequences[0, len(prompt) :].tolist()
    ends = [index for index, token_id in enumerate(generated) if token_id in STOP_IDS]
    score = made.sequences_scores[0].item() if case["num_beams"] > 1 else None
    return generated[: ends[0] + 1] if ends else generated, score


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some=st.lists(cases(), min_size=3, max_size=3))
def test_many_parameters_at_once_give_what_transformers_gives(subject: Subject, some: list[dict[str, Any]]) -> None:
    prompts = [subject.prompts[case["prompt"]] for case in some]
    # In one batch: whether each also gets what it gets alone is then part of the comparison.
    collector = subject.run([engine_request(str(i), prompts[i], case) for i, case in enumerate(some)])
    for i, case in enumerate(some):
        wanted, score = transformers_says(subject, prompts[i], case)
        assert collector.tokens[str(i)] == [wanted], case
        if score is not None:
            assert collector.scores[str(i)] == pytest.approx([score], rel=1e-5, abs=1e-4)


def test_beam_sampling_draws_without_replacement_from_the_warped_distribution(subject: Subject) -> None:
    """One step of two beams: the likelier of the first two draws is returned."""
    prompt, draws, top_k = subject.prompts[0], 600, 5
    with torch.inference_mode():
        scores = torch.log_softmax(subject.oracle(torch.tensor([prompt])).logits[0, -1].float(), dim=-1) / 2.0
    kept = scores.topk(top_k)
    chances = torch.softmax(kept.values, dim=-1).tolist()
    expected: Counter[int] = Counter()
    for first, second in itertools.permutations(range(top_k), 2):
        likelier = min(first, second)  # descending order
        expected[kept.indices[likelier].item()] += chances[first] * chances[second] / (1 - chances[first])
    requests = [
        EngineRequest(
            request_id=str(seed),
            prompt_ids=prompt,
            max_new_tokens=1,
            sampling=SamplingParams(do_sample=True, seed=1000 * seed, temperature=2.0, top_k=top_k),
            beams=BeamParams(num_beams=2),
        )
        for seed in range(draws)
    ]
    seen = Counter(tokens[0][0] for tokens in subject.run(requests).tokens.values())
    assert set(seen) <= set(expected)
    chi_square = sum((seen[one] - draws * chance) ** 2 / (draws * chance) for one, chance in expected.items())
    assert chi_square < 18.5  # the 0.999 quantile for 4 degrees of freedom
