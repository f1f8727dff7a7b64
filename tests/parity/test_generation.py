"""Whole generations against transformers' `generate`, float32: the same tokens, whatever the engine does meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gyrfalcon.engine.core import CoreLimits, EngineCore
from gyrfalcon.engine.interface import EngineRequest, SamplingParams
from gyrfalcon.kernels.select import select_ops
from gyrfalcon.models.decoder import CausalLM
from gyrfalcon.models.registry import load_model
from gyrfalcon.runner.model_runner import ModelRunner
from gyrfalcon.testing.checkpoints import cached_checkpoint
from gyrfalcon.testing.collector import Collector

FORMS = (
    "falcon-7b",
    "falcon-40b",
    "falcon-180b",
    "falcon-11b",
    "falcon-rw",
    "falcon-rw-6-heads",
    "falcon-40b-legacy",
    "llama",
    "llama-tied",
    "falcon3",
)
NUM_NEW = 200
BLOCK_SIZE = 16  # the smallest that the CPU kernels read
PLAIN = ("plain falcon-7b", "plain llama")  # by the operations one by one, also where there are kernels
PROMPTS = (
    "The falcon climbs",
    "In the morning the young birds leave the cliff, one after another, and",
    "3 birds, 14 feathers",
    "Z",
    "A stoop begins high; the wings are folded, and the ground comes closer very fast. " * 3,
)


@dataclass(frozen=True, slots=True)
class Subject:
    """A checkpoint loaded twice: by us, and by transformers."""

    model: CausalLM
    oracle: Any
    prompts: tuple[tuple[int, ...], ...]
    continuations: tuple[list[int], ...]  # transformers' greedy tokens after each prompt

    def core(self, *, num_blocks: int = 400, **limits: Any) -> Collector:
        runner = ModelRunner(self.model, "cpu", num_blocks=num_blocks, block_size=BLOCK_SIZE)
        return Collector(EngineCore(runner, CoreLimits(**limits)))

    def run(self, requests: list[EngineRequest], **limits: Any) -> Collector:
        collector = self.core(**limits)
        for request in requests:
            collector.submit(request)
        collector.run(most_steps=20_000)
        assert not collector.failures
        return collector

    def greedy(self) -> list[EngineRequest]:
        return [
            EngineRequest(request_id=str(index), prompt_ids=prompt, max_new_tokens=NUM_NEW)
            for index, prompt in enumerate(self.prompts)
        ]


@pytest.fixture(scope="module", params=[*FORMS, *PLAIN])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    form = request.param.removeprefix("plain ")
    folder: Path = cached_checkpoint(tmp_path_factory.getbasetemp() / "checkpoints", form, trained=True)
    ops = select_ops("cpu") if request.param in PLAIN else select_ops("cpu", block_size=BLOCK_SIZE, num_threads=2)
    model = load_model(folder, dtype="float32", device="cpu", ops=ops)
    if "legacy" in form:
        # transformers has no place for the old names; the same weights under the new ones are its oracle.
        folder = cached_checkpoint(folder.parent, form.removesuffix("-legacy"), trained=True)
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = tuple(tuple(tokenizer(prompt).input_ids) for prompt in PROMPTS)
    return Subject(
        model=model,
        oracle=oracle,
        prompts=prompts,
        continuations=tuple(_greedy_of(oracle, prompt) for prompt in prompts),
    )


def _greedy_of(oracle: Any, prompt: tuple[int, ...]) -> list[int]:
    ids = torch.tensor([prompt])
    oracle.generation_config.eos_token_id = None
    with torch.inference_mode():
        whole = oracle.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW, do_sample=False, pad_token_id=0
        )
    return whole[0, len(prompt) :].tolist()


def test_greedy_tokens_are_those_of_transformers_one_request_at_a_time(subject: Subject) -> None:
    for request, continuation in zip(subject.greedy(), subject.continuations, strict=True):
        assert subject.run([request]).tokens[request.request_id] == [continuation]


@pytest.mark.parametrize(
    "limits",
    [
        pytest.param({"token_budget": 5, "max_rows": 5}, id="chunked prefill"),
        pytest.param({"token_budget": 512, "max_rows": 32}, id="one batch"),
        pytest.param({"token_budget": 64, "max_rows": 8, "num_blocks": 32}, id="preemption"),
    ],
)
def test_greedy_tokens_stay_the_same(subject: Subject, limits: dict[str, int]) -> None:
    collector = subject.run(subject.greedy(), **limits)
    assert [collector.tokens[str(index)][0] for index in range(len(PROMPTS))] == list(subject.continuations)
    if "num_blocks" in limits:
        assert collector.core.stats().num_preemptions > 0


def test_greedy_tokens_stay_the_same_after_prefix_hits(subject: Subject) -> None:
    collector = subject.core()
    for repeat in ("cold", "warm"):
        for request in subject.greedy():
            collector.submit(
                EngineRequest(request_id=repeat + request.request_id, prompt_ids=request.prompt_ids, max_new_tokens=60)
            )
            collector.run()
    for index, continuation in enumerate(subject.continuations):
        assert collector.tokens[f"warm{index}"] == [continuation[:60]]
    assert collector.prompts[f"warm{len(PROMPTS) - 1}"].num_cached_tokens >= BLOCK_SIZE


def test_a_mixed_batch_of_32_gives_each_request_what_it_gets_alone(subject: Subject) -> None:
    mixed = [
        EngineRequest(
            request_id=str(index),
            prompt_ids=subject.prompts[index % len(PROMPTS)],
            max_new_tokens=20 + 3 * (index % 5),
            num_choices=1 + (index % 7 == 3),
            prompt_logprobs=index % 4 == 1,
            sampling=SamplingParams()
            if index % 2 == 0 and index % 7 != 3
            else SamplingParams(
                do_sample=True,
                seed=index,
                temperature=[0.7, 1.0, 1.5][index % 3],
                top_k=[0, 10, 300][index % 3],
                top_p=[1.0, 0.9][index % 2],
                typical_p=[1.0, 0.8][index % 5 == 1],
                repetition_penalty=[1.0, 1.2][index % 3 == 2],
            ),
        )
        for index in range(32)
    ]
    # Chunks as large as the budget from the first step on: how fast steps are must not decide whether blocks run out.
    together = subject.run(mixed, token_budget=48, max_rows=32, num_blocks=20, step_cost_tokens=96)
    for request in mixed:
        alone = subject.run([request])
        assert together.tokens[request.request_id] == alone.tokens[request.request_id]
        # Float32 on CPU promises more than equal tokens: equal bits.
        assert together.logprobs[request.request_id] == alone.logprobs[request.request_id]
        assert together.prompts[request.request_id].logprobs == alone.prompts[request.request_id].logprobs
    assert together.core.stats().num_preemptions > 0


@pytest.mark.parametrize("budget", [7, 512])
def test_log_probabilities_are_those_of_transformers(subject: Subject, budget: int) -> None:
    prompt, continuation = subject.prompts[4], subject.continuations[4]
    request = EngineRequest(request_id="scored", prompt_ids=prompt, max_new_tokens=NUM_NEW, prompt_logprobs=True)
    collector = subject.run([request], token_budget=budget, max_rows=4)
    with torch.inference_mode():
        logits = subject.oracle(torch.tensor([[*prompt, *continuation]])).logits[0]
    wanted = torch.log_softmax(logits[:-1].float(), dim=-1).gather(1, torch.tensor([*prompt, *continuation])[1:, None])
    found = collector.prompts["scored"].logprobs
    assert found is not None
    assert found[0] is None
    every = torch.tensor([*found[1:], *collector.logprobs["scored"][0]])
    torch.testing.assert_close(every, wanted.squeeze(1), rtol=0, atol=1e-4)
