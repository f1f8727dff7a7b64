"""Beam search against transformers' `generate`, diverse beam search against a plain implementation of the algorithm
of its earlier releases; float32, tokens and sequence scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from gyrfalcon.engine.core import CoreLimits, EngineCore
from gyrfalcon.engine.interface import BeamParams, EarlyStopping, EngineRequest, SamplingParams
from gyrfalcon.kernels.select import select_ops
from gyrfalcon.models.decoder import CausalLM
from gyrfalcon.models.registry import load_model
from gyrfalcon.runner.model_runner import ModelRunner
from gyrfalcon.testing.checkpoints import cached_checkpoint
from gyrfalcon.testing.collector import Collector

FORMS = ("falcon-7b", "falcon-40b", "falcon-11b", "falcon-rw", "llama")
PROMPTS = ("The falcon climbs", "3 birds, 14", "Nobody hears", "Z")
HF_EARLY = {EarlyStopping.TRUE: True, EarlyStopping.FALSE: False, EarlyStopping.NEVER: "never"}
# Ids that these models like to write: searches meet them early, late, or never.
STOP_IDS = (0, 11, 265, 290)

BLOCK_SIZE = 16  # the smallest that the CPU kernels read


@dataclass(frozen=True, slots=True)
class Subject:
    model: CausalLM
    oracle: Any
    prompts: tuple[tuple[int, ...], ...]

    def run(self, requests: list[EngineRequest], *, num_blocks: int = 600, **limits: Any) -> Collector:
        runner = ModelRunner(self.model, "cpu", num_blocks=num_blocks, block_size=BLOCK_SIZE)
        collector = Collector(EngineCore(runner, CoreLimits(**({"token_budget": 256, "max_rows": 64} | limits))))
        for request in requests:
            collector.submit(request)
        collector.run(most_steps=20_000)
        assert not collector.failures
        return collector

    def next_scores(self, ids: list[int]) -> torch.Tensor:
        """Log-probabilities of the token after `ids`, by transformers."""
        with torch.inference_mode():
            return torch.log_softmax(self.oracle(torch.tensor([ids])).logits[0, -1].float(), dim=-1)


@pytest.fixture(scope="module", params=FORMS)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder: Path = cached_checkpoint(tmp_path_factory.getbasetemp() / "checkpoints", request.param, trained=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ops = select_ops("cpu", block_size=BLOCK_SIZE, num_threads=2)
    return Subject(
        model=load_model(folder, dtype="float32", device="cpu", ops=ops),
        oracle=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa"),
        prompts=tuple(tuple(tokenizer(prompt).input_ids) for prompt in PROMPTS),
    )


def beam_request(request_id: str, prompt: tuple[int, ...], drawn: dict[str, Any]) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        prompt_ids=prompt,
        max_new_tokens=drawn["max_new_tokens"],
        min_new_tokens=drawn.get("min_new_tokens", 0),
        stop_token_ids=drawn["stop"],
        num_choices=drawn["returned"],
        sampling=SamplingParams(repetition_penalty=drawn.get("repetition_penalty", 1.0)),
        beams=BeamParams(
            num_beams=drawn["num_beams"],
            num_beam_groups=drawn.get("groups", 1),
            diversity_penalty=drawn.get("diversity", 0.0),
            length_penalty=drawn["length_penalty"],
            early_stopping=drawn["early"],
        ),
    )


def transformers_beams(
    subject: Subject, prompt: tuple[int, ...], drawn: dict[str, Any]
) -> tuple[list[list[int]], list[float]]:
    """The sequences `generate` returns, each up to its end, and their scores."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        made = subject.oracle.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=drawn["max_new_tokens"],
            min_new_tokens=drawn.get("min_new_tokens", 0) or None,
            do_sample=False,
            num_beams=drawn["num_beams"],
            num_return_sequences=drawn["returned"],
            length_penalty=drawn["length_penalty"],
            early_stopping=HF_EARLY[drawn["early"]],
            repetition_penalty=drawn.get("repetition_penalty", 1.0),
            eos_token_id=list(drawn["stop"]) or None,
            pad_token_id=383,
            return_dict_in_generate=True,
            output_scores=True,
        )
    rows = [_cut(row[len(prompt) :].tolist(), drawn["stop"]) for row in made.sequences]
    return rows, made.sequences_scores.tolist()


def _cut(ids: list[int], stop: tuple[int, ...]) -> list[int]:
    ends = [index for index, token_id in enumerate(ids) if token_id in stop]
    return ids[: ends[0] + 1] if ends else ids


def plain_group_beams(  # noqa: PLR0912, PLR0915  (written out, so that it can be compared with its description)
    next_scores: Callable[[list[int]], torch.Tensor], prompt: tuple[int, ...], drawn: dict[str, Any]
) -> tuple[list[list[int]], list[float]]:
    """Diverse beam search written out: one forward pass a beam and step, nothing shared, nothing clever."""
    num_groups, width = drawn["groups"], drawn["num_beams"] // drawn["groups"]
    limit, penalty = len(prompt) + drawn["max_new_tokens"], drawn["length_penalty"]
    stop, padding = drawn["stop"], (*drawn["stop"], 0)[0]
    beams = [[(list(prompt), 0.0 if b == 0 else -1e9) for b in range(width)] for _ in range(num_groups)]
    pools: list[list[tuple[float, int, list[int]]]] = [[] for _ in range(num_groups)]
    done = [False] * num_groups
    length, serial = len(prompt), 0

    def add(pool: list[tuple[float, int, list[int]]], total: float, num_tokens: int, ids: list[int]) -> None:
        nonlocal serial
        score = total / num_tokens**penalty
        if len(pool) < width or score > min(one[0] for one in pool):
            serial += 1
            pool.append((score, serial, ids))
            if len(pool) > width:
                pool.remove(min(pool, key=lambda one: one[0]))

    while not all(done) and length < limit:
        chosen: list[int] = []
        for g in range(num_groups):
            if done[g]:
                beams[g] = [([*ids, padding], score) for ids, score in beams[g]]
                chosen += [padding] * width
                continue
            candidates = []
            for b, (ids, score) in enumerate(beams[g]):
                scores = next_scores(ids).clone()
                for token_id in chosen:
                    scores[token_id] -= drawn["diversity"]
                seen = torch.tensor(sorted(set(ids)))
                scores[seen] *= drawn["repetition_penalty"]
                if length - len(prompt) < drawn["min_new_tokens"]:
                    scores[list(stop)] = -torch.inf
                totals = scores + torch.tensor(score, dtype=torch.float32)
                candidates += [(-total, b, v) for v, total in enumerate(totals.tolist())]
            candidates.sort()
            best_total = -candidates[0][0]
            running = []
            for rank, (negative, b, v) in enumerate(candidates[: max(2, 1 + len(stop)) * width]):
                ids = [*beams[g][b][0], v]
                if v in stop:
                    if rank < width:
                        add(pools[g], -negative, length + 1 - len(prompt), ids)
                elif len(running) < width:
                    running.append((ids, -negative))
                if len(running) == width:
                    break
            beams[g] = running
            chosen += [ids[-1] for ids, _ in running]
            if len(pools[g]) == width:
                never = drawn["early"] is EarlyStopping.NEVER and penalty > 0
                num_tokens = drawn["max_new_tokens"] if never else length + 1 - len(prompt)
                worst = min(one[0] for one in pools[g])
                done[g] = drawn["early"] is EarlyStopping.TRUE or worst >= best_total / num_tokens**penalty
        length += 1
    for g in range(num_groups):
        if not done[g]:
            for ids, score in beams[g]:
                add(pools[g], score, length - len(prompt), ids)
    ranked = sorted((one for pool in pools for one in pool), key=lambda one: one[0])[::-1][: drawn["returned"]]
    return [ids[len(prompt) :] for _, _, ids in ranked], [score for score, _, _ in ranked]


@st.composite
def searches(draw: st.DrawFn) -> dict[str, Any]:
    num_beams = draw(st.integers(2, 5))
    return {
        "num_beams": num_beams,
        "returned": draw(st.integers(1, num_beams)),
        "max_new_tokens": draw(st.sampled_from([1, 2, 7, 20])),
        "min_new_tokens": draw(st.sampled_from([0, 0, 4])),
        "length_penalty": draw(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0])),
        "early": draw(st.sampled_from(EarlyStopping)),
        "repetition_penalty": draw(st.sampled_from([1.0, 1.0, 1.3])),
        "stop": tuple(draw(st.lists(st.sampled_from(STOP_IDS), max_size=2, unique=True))),
        "prompt": draw(st.integers(0, len(PROMPTS) - 1)),
    }


@st.composite
def group_searches(draw: st.DrawFn) -> dict[str, Any]:
    drawn = draw(searches())
    groups, width = draw(st.sampled_from([(2, 1), (2, 2), (3, 2), (4, 1)]))
    drawn |= {"groups": groups, "num_beams": groups * width, "diversity": draw(st.sampled_from([0.3, 1.0, 5.0]))}
    return drawn | {"returned": draw(st.integers(1, groups * width))}


SETTINGS = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@SETTINGS
@given(drawn=searches())
def test_beam_search_is_that_of_transformers(subject: Subject, drawn: dict[str, Any]) -> None:
    prompt = subject.prompts[drawn["prompt"]]
    rows, scores = transformers_beams(subject, prompt, drawn)
    collector = subject.run([beam_request("a", prompt, drawn)])
    assert collector.tokens["a"] == rows
    assert collector.scores["a"] == pytest.approx(scores, rel=1e-5, abs=1e-4)


@settings(SETTINGS, max_examples=15)
@given(drawn=group_searches())
def test_diverse_beam_search_is_the_plain_algorithm(subject: Subject, drawn: dict[str, Any]) -> None:
    prompt = subject.prompts[drawn["prompt"]]
    rows, scores = plain_group_beams(subject.next_scores, prompt, drawn)
    collector = subject.run([beam_request("a", prompt, drawn)])
    assert collector.tokens["a"] == rows
    assert collector.scores["a"] == pytest.approx(scores, rel=1e-5, abs=1e-4)


@settings(SETTINGS, max_examples=4)
@given(drawn=st.lists(st.one_of(searches(), group_searches()), min_size=4, max_size=6))
def test_searches_in_one_batch_give_what_they_give_alone(subject: Subject, drawn: list[dict[str, Any]]) -> None:
    requests = [beam_request(str(i), subject.prompts[one["prompt"]], one) for i, one in enumerate(drawn)]
    others = [
        EngineRequest(
            request_id=f"other{i}",
            prompt_ids=prompt,
            max_new_tokens=25,
            sampling=SamplingParams(do_sample=i > 1, seed=i),
        )
        for i, prompt in enumerate(subject.prompts)
    ]
    together = subject.run([*requests, *others], num_blocks=40, max_rows=24, token_budget=40)
    for request in [*requests, *others]:
        alone = subject.run([request])
        assert together.tokens[request.request_id] == alone.tokens[request.request_id]
        assert together.logprobs[request.request_id] == alone.logprobs[request.request_id]
        assert together.scores.get(request.request_id) == alone.scores.get(request.request_id)


def test_a_beam_search_never_runs_its_prompt_again_and_shares_it(subject: Subject) -> None:
    prompt = subject.prompts[1] * 12
    request = EngineRequest(request_id="a", prompt_ids=prompt, max_new_tokens=10, beams=BeamParams(num_beams=4))
    runner = ModelRunner(subject.model, "cpu", num_blocks=600, block_size=BLOCK_SIZE)
    core = EngineCore(runner, CoreLimits())
    collector = Collector(core)
    collector.submit(request)
    most_used = 0.0
    while core.has_work:
        collector.step()
        most_used = max(most_used, core.stats().cache_usage)
    assert core.stats().prefill_tokens == len(prompt)
    num_shared = len(prompt) // BLOCK_SIZE
    assert most_used * 599 <= num_shared + 4 * 3
