"""`/chat` over a real engine and a tiny checkpoint: its texts and scores are those of transformers' `generate`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx2
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gyrfalcon.engine.core import CoreLimits, EngineCore
from gyrfalcon.engine.local import LocalEngine
from gyrfalcon.http.app import create_app
from gyrfalcon.http.settings import HttpSettings
from gyrfalcon.kernels.select import select_ops
from gyrfalcon.models.decoder import CausalLM
from gyrfalcon.models.registry import load_model
from gyrfalcon.runner.model_runner import ModelRunner
from gyrfalcon.service.validation import resolve_limits
from gyrfalcon.testing.checkpoints import cached_checkpoint
from gyrfalcon.testing.text import text_service

PROMPT = "The falcon climbs above the"
GREEDY = {"do_sample": False, "max_new_tokens": 12}
NUM_BLOCKS, BLOCK_SIZE = 200, 8


@dataclass(frozen=True, slots=True)
class Subject:
    folder: Path
    model: CausalLM
    oracle: Any
    tokenizer: Any

    def expected(self, prompt: str, **kwargs: Any) -> Any:
        """transformers' own output for the prompt, its dictionary form."""
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            return self.oracle.generate(ids, **kwargs, return_dict_in_generate=True, output_scores=True)

    def texts(self, prompt: str, output: Any) -> list[str]:
        start = len(self.tokenizer(prompt).input_ids)
        return [self.tokenizer.decode(row[start:], skip_special_tokens=True) for row in output.sequences]


@pytest.fixture(scope="module", params=["falcon-7b", "llama"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = cached_checkpoint(tmp_path_factory.getbasetemp() / "checkpoints", request.param, trained=True)
    return Subject(
        folder=folder,
        model=load_model(folder, dtype="float32", device="cpu", ops=select_ops("cpu")),
        oracle=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(folder),
    )


@pytest.fixture
async def client(subject: Subject) -> AsyncIterator[httpx2.AsyncClient]:
    runner = ModelRunner(subject.model, "cpu", num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    engine = LocalEngine(EngineCore(runner, CoreLimits(max_rows=64)))
    limits = resolve_limits(engine.facts, block_size=BLOCK_SIZE)
    service, metrics = text_service(engine, subject.folder, limits=limits)
    transport = httpx2.ASGITransport(create_app(service, HttpSettings(), metrics))
    async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
        yield client
    await service.close()


async def chat(client: httpx2.AsyncClient, kwargs: dict[str, Any], **body: Any) -> httpx2.Response:
    return await client.post(
        "/chat", json={"prompt": PROMPT, "return_full_text": False, "generate_kwargs": kwargs, **body}
    )


async def answer(client: httpx2.AsyncClient, kwargs: dict[str, Any], **body: Any) -> Any:
    response = await chat(client, kwargs, **body)
    assert response.status_code == 200, response.text
    return response.json()


DETERMINISTIC: dict[str, dict[str, Any]] = {
    "greedy": {},
    "max_length": {"max_new_tokens": None, "max_length": 30},
    "min_length": {"min_length": 16, "eos_token_id": 265},
    "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": 265},
    "repetition_penalty": {"repetition_penalty": 30.0},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 0.4},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[265], [290, 262], [11]]},
    "sequence_bias": {"sequence_bias": [[[265], -20.0], [[290], 6.0]]},
    "suppress_tokens": {"suppress_tokens": [265, 290], "begin_suppress_tokens": [262, 270]},
    "forced_eos_token_id": {"forced_eos_token_id": 50},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": [2, 1.9], "max_new_tokens": 30},
    "remove_invalid_values": {"remove_invalid_values": True, "renormalize_logits": True},
    "beams": {"num_beams": 4},
    "beams, shorter": {"num_beams": 3, "length_penalty": -2.0, "early_stopping": True, "eos_token_id": 265},
    "beams, never": {"num_beams": 3, "length_penalty": 1.5, "early_stopping": "never", "eos_token_id": 265},
    "beams, several": {"num_beams": 4, "num_return_sequences": 3},
    "beams and rules": {
        "num_beams": 4,
        "num_return_sequences": 2,
        "repetition_penalty": 1.4,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[290], [262, 265]],
        "min_new_tokens": 5,
        "forced_eos_token_id": 50,
        "renormalize_logits": True,
    },
    "sampling from one token": {"do_sample": True, "min_p": 1.0},
}


@pytest.mark.parametrize("name", DETERMINISTIC)
async def test_the_text_is_what_transformers_generates(subject: Subject, client: httpx2.AsyncClient, name: str) -> None:
    asked = GREEDY | DETERMINISTIC[name]
    output = subject.expected(PROMPT, **{key: value for key, value in asked.items() if value is not None})
    got = await answer(client, asked)
    assert list(got) == ["Result"]
    assert got["Result"] == "".join(subject.texts(PROMPT, output))


def drawn_kwargs(random: Random) -> dict[str, Any]:
    """Some parameters that leave nothing to chance, in a combination whose outcome transformers defines."""

    def ids(most: int) -> list[int]:
        return [
            random.choice([0, 11, 50, 265, 290, 262, random.randrange(384)]) for _ in range(random.randint(1, most))
        ]

    options: dict[str, Any] = {
        "repetition_penalty": random.uniform(0.7, 3),
        "encoder_repetition_penalty": random.uniform(0.5, 2),
        "no_repeat_ngram_size": random.randint(1, 4),
        "encoder_no_repeat_ngram_size": random.randint(1, 3),
        "bad_words_ids": [ids(3) for _ in range(random.randint(1, 4))],
        "sequence_bias": [[ids(2), random.uniform(-8, 8)] for _ in range(random.randint(1, 3))],
        "suppress_tokens": ids(4),
        "begin_suppress_tokens": ids(4),
        "min_length": random.randint(1, 18),
        "forced_eos_token_id": 51,
        "renormalize_logits": True,
        "num_beams": random.randint(2, 5),
        "length_penalty": random.choice([-1.5, 0.0, 0.5, 2.0]),
        "early_stopping": random.choice([True, False, "never"]),
    }
    names = random.sample(sorted(options), random.randint(2, 6))
    made = {"do_sample": False, "max_new_tokens": random.randint(8, 14)} | {name: options[name] for name in names}
    if "num_beams" in made:
        made["num_return_sequences"] = random.randint(1, made["num_beams"])
    return made


@pytest.mark.parametrize("seed", range(4))
async def test_drawn_combinations_together_are_what_transformers_generates(
    subject: Subject, client: httpx2.AsyncClient, seed: int
) -> None:
    random = Random(seed)
    cases = [(random.choice([PROMPT, "Z", "3 birds, 14"]), drawn_kwargs(random)) for _ in range(8)]
    answers = await asyncio.gather(*(answer(client, kwargs, prompt=prompt, details=True) for prompt, kwargs in cases))
    for (prompt, kwargs), got in zip(cases, answers, strict=True):
        texts = [sequence["generated_text"] for sequence in got["details"]["sequences"]]
        assert texts == subject.texts(prompt, subject.expected(prompt, **kwargs)), kwargs


async def test_the_first_token_after_a_prompt_of_one_is_forced(subject: Subject, client: httpx2.AsyncClient) -> None:
    asked = GREEDY | {"forced_bos_token_id": 50}
    got = await answer(client, asked, prompt="Z")
    assert got["Result"] == subject.texts("Z", subject.expected("Z", **asked))[0]


async def test_details_hold_the_scores_of_a_search(subject: Subject, client: httpx2.AsyncClient) -> None:
    asked = GREEDY | {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5}
    output = subject.expected(PROMPT, **asked)
    steps = subject.oracle.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
    num_prompt = len(subject.tokenizer(PROMPT).input_ids)
    got = await answer(client, {**asked, "output_scores": True}, details=True)
    details = got["details"]
    assert details["prompt_tokens"] == num_prompt
    assert "".join(sequence["generated_text"] for sequence in details["sequences"]) == got["Result"]
    for index, sequence in enumerate(details["sequences"]):
        length = sequence["generated_tokens"]
        assert sequence["sequence"] == output.sequences[index][num_prompt:][:length].tolist()
        assert sequence["sequences_scores"] == pytest.approx(output.sequences_scores[index].item(), abs=1e-4)
        assert sequence["scores"] == pytest.approx(steps[index][:length].tolist(), abs=1e-4)
        assert sequence["beam_indices"] == output.beam_indices[index][:length].tolist()
        assert sequence["finish_reason"] == ("eos_token" if sequence["sequence"][-1] == 0 else "length")
        assert sum(sequence["scores"]) / length**0.5 == pytest.approx(sequence["sequences_scores"], abs=1e-4)


async def test_details_hold_the_log_probabilities_of_greedy_text(subject: Subject, client: httpx2.AsyncClient) -> None:
    asked = GREEDY | {"repetition_penalty": 1.5}
    output = subject.expected(PROMPT, **asked)
    steps = subject.oracle.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    got = await answer(client, {**asked, "return_dict_in_generate": True}, details=True)
    (sequence,) = got["details"]["sequences"]
    assert sequence["scores"] == pytest.approx(steps[0].tolist(), abs=1e-4)
    assert (sequence["sequences_scores"], sequence["beam_indices"], sequence["seed"]) == (None, None, None)


async def test_diverse_groups_begin_with_the_greedy_text(client: httpx2.AsyncClient) -> None:
    asked = GREEDY | {"min_new_tokens": 12}
    greedy = (await answer(client, asked))["Result"]
    groups = {"num_beams": 3, "num_beam_groups": 3, "diversity_penalty": 50.0, "num_return_sequences": 3}
    details = (await answer(client, asked | groups, details=True))["details"]
    texts = [sequence["generated_text"] for sequence in details["sequences"]]
    assert greedy in texts
    assert len(set(texts)) == 3


async def test_a_sampled_search_is_repeated_by_its_seed(client: httpx2.AsyncClient) -> None:
    asked = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 12, "temperature": 1.5, "top_k": 0}
    first = await answer(client, asked, details=True)
    seed = first["details"]["sequences"][0]["seed"]
    assert await answer(client, {**asked, "seed": seed}, details=True) == first
    others = [await answer(client, {**asked, "seed": seed + step}) for step in (1, 2, 3)]
    assert any(other["Result"] != first["Result"] for other in others)


async def test_a_stream_ends_with_the_result(client: httpx2.AsyncClient) -> None:
    asked = GREEDY | {"no_repeat_ngram_size": 2}
    whole = await answer(client, asked, details=True)
    response = await chat(client, asked, stream=True, details=True)
    assert response.headers["content-type"] == "text/event-stream"
    *deltas, last = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]
    assert last == whole
    assert "".join(delta["Delta"] for delta in deltas) == whole["Result"]
    assert len(deltas) == whole["details"]["sequences"][0]["generated_tokens"]


async def test_the_other_dialect_takes_the_same_parameters(subject: Subject, client: httpx2.AsyncClient) -> None:
    search = {
        "num_beams": 4,
        "num_return_sequences": 2,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[290], [262, 265]],
    }
    output = subject.expected(PROMPT, **GREEDY, **search)
    first, second = subject.texts(PROMPT, output)
    parameters = {"max_new_tokens": 12, "details": True, "decoder_input_details": True, **search}
    response = await client.post("/generate", json={"inputs": PROMPT, "parameters": parameters})
    assert response.status_code == 200, response.text
    got = response.json()
    assert got["generated_text"] == first
    assert [other["generated_text"] for other in got["details"]["best_of_sequences"]] == [second]
    assert len(got["details"]["prefill"]) == len(subject.tokenizer(PROMPT).input_ids)


REFUSED: dict[str, dict[str, Any]] = {
    "num_beams": {"num_beams": 10_000},
    "num_return_sequences": {"num_beams": 2, "num_return_sequences": 3},
    "num_beam_groups": {"num_beams": 4, "num_beam_groups": 3},
    "diversity_penalty": {"num_beams": 4, "num_beam_groups": 2},
    "length_penalty": {"num_beams": 4, "length_penalty": 1e300},
    "early_stopping": {"num_beams": 4, "early_stopping": "soon"},
    "repetition_penalty": {"repetition_penalty": -1},
    "bad_words_ids": {"bad_words_ids": [265]},
    "sequence_bias": {"sequence_bias": [[[400], 1.0]]},
    "suppress_tokens": {"suppress_tokens": [-1]},
    "forced_eos_token_id": {"forced_eos_token_id": 384},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 0},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": [-1, 2]},
    "max_length": {"max_new_tokens": None, "max_length": 3},
    "max_new_tokens": {"max_new_tokens": 0},
    "min_new_tokens": {"min_new_tokens": 13},
    "eos_token_id": {"eos_token_id": 10**9},
    "no_such_member": {"no_such_member": 1},
}


async def test_refused_requests_are_named_and_leave_their_neighbour_alone(client: httpx2.AsyncClient) -> None:
    neighbour = GREEDY | {"max_new_tokens": 60}
    alone = await chat(client, neighbour)
    refusals = [chat(client, GREEDY | kwargs) for kwargs in REFUSED.values()]
    beside, *refused = await asyncio.gather(chat(client, neighbour), *refusals)
    assert beside.content == alone.content
    for name, response in zip(REFUSED, refused, strict=True):
        assert response.status_code == 422, name
        assert name in str(response.json()["detail"])


EXTREMES: list[dict[str, Any]] = [
    {"suppress_tokens": list(range(384))},  # nothing is left: this request is refused
    {"num_beams": 3, "suppress_tokens": list(range(384))},
    {"num_beams": 16, "num_return_sequences": 16, "length_penalty": -10},
    {"num_beams": 16, "length_penalty": 10, "early_stopping": "never", "eos_token_id": 265},
    {"num_beams": 4, "suppress_tokens": list(range(382))},
    {"sequence_bias": [[[id_], 1e30] for id_ in range(300)], "repetition_penalty": 1e30},
    {"num_beams": 2, "sequence_bias": [[[id_], 1e30] for id_ in range(300)], "remove_invalid_values": True},
    {"exponential_decay_length_penalty": [0, 1e30]},
    {"exponential_decay_length_penalty": [2**31 - 1, 1e-30], "num_beams": 2},
    {"no_repeat_ngram_size": 10**30, "encoder_no_repeat_ngram_size": 10**9, "min_length": 10**30},
    {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 1e38},
    {"encoder_repetition_penalty": 1e-37, "num_beams": 2},
    {"do_sample": True, "num_beams": 4, "temperature": 1e-30, "top_p": 0, "eta_cutoff": 0.99, "epsilon_cutoff": 0.99},
]


async def test_extreme_requests_are_answered_and_leave_their_neighbour_alone(client: httpx2.AsyncClient) -> None:
    neighbour = GREEDY | {"max_new_tokens": 60}
    alone = await chat(client, neighbour)
    extremes = [chat(client, GREEDY | kwargs) for kwargs in EXTREMES]
    beside, *others = await asyncio.gather(chat(client, neighbour), *extremes)
    assert beside.content == alone.content
    assert [response.status_code for response in others[:2]] == [422, 422]
    for kwargs, response in zip(EXTREMES, others, strict=True):
        assert response.status_code in {200, 422}, kwargs
        assert list(response.json()) in (["Result"], ["detail"])
    assert (await chat(client, neighbour)).content == alone.content
