"""Beams and rules about ids in the dialect of text-generation-inference, whose own releases do not have them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from gyrfalcon.engine.interface import BeamParams, EarlyStopping
from gyrfalcon.testing.engine import FakeEngine

from .conftest import MakeClient


def generate(client: TestClient, path: str = "/generate", **parameters: Any) -> Any:
    return client.post(path, json={"inputs": "the people", "parameters": {"max_new_tokens": 3, **parameters}})


def test_they_reach_the_engine(make_client: MakeClient) -> None:
    engine = FakeEngine()
    answer = generate(
        make_client(engine),
        num_beams=4,
        num_return_sequences=2,
        early_stopping="never",
        bad_words_ids=[[5], [6, 7]],
        sequence_bias=[[[5, 6], -2]],
        exponential_decay_length_penalty=[1, 2],
        forced_eos_token_id=[7, 8],
        min_length=5,
    )
    assert answer.status_code == 200, answer.text
    (request,) = engine.requests
    assert request.num_choices == 2
    assert request.beams == BeamParams(num_beams=4, early_stopping=EarlyStopping.NEVER)
    assert request.sampling.bad_words_ids == ((5,), (6, 7))
    assert request.sampling.sequence_bias == (((5, 6), -2.0),)
    assert request.sampling.exponential_decay_length_penalty == (1, 2.0)
    assert request.sampling.forced_eos_token_ids == (7, 8)
    assert request.min_new_tokens == 5 - len(request.prompt_ids)


def test_the_other_sequences_are_in_the_details(make_client: MakeClient) -> None:
    answer = generate(make_client(), do_sample=True, num_return_sequences=3, details=True).json()
    texts = {answer["generated_text"], *(one["generated_text"] for one in answer["details"]["best_of_sequences"])}
    assert len(texts) == 3


@pytest.mark.parametrize(
    "parameters",
    [
        {"num_beams": "2"},
        {"num_beams": 2.0},
        {"num_beams": True},
        {"num_beams": 17},
        {"early_stopping": 1},
        {"bad_words_ids": [5]},
        {"bad_words_ids": [["5"]]},
        {"sequence_bias": [[[5], "2"]]},
        {"forced_eos_token_id": [512]},
        {"remove_invalid_values": 1},
        {"exponential_decay_length_penalty": [1, 2, 3]},
        {"min_p": 2},
        {"min_length": -1},
    ],
)
def test_types_are_strict_and_rules_are_named(make_client: MakeClient, parameters: dict[str, Any]) -> None:
    answer = generate(make_client(), **parameters)
    assert answer.status_code == 422
    assert next(iter(parameters)) in answer.json()["error"]


@pytest.mark.parametrize("parameters", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_a_stream_has_one_sequence(make_client: MakeClient, parameters: dict[str, Any]) -> None:
    answer = generate(make_client(), "/generate_stream", **parameters)
    (event,) = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line]
    assert event["error_type"] == "validation"
    assert next(iter(parameters)) in event["error"]
