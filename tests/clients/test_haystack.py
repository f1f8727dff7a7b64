"""Haystack's HuggingFaceAPIGenerator, over the hub's client: it always asks for details, and reads them."""

from __future__ import annotations

import re

import pytest

from tests.clients.observation import FULL, PROMPT, TOO_LONG, Observe, Seen


@pytest.fixture(scope="module")
def seen(observe: Observe) -> Seen:
    return observe("haystack", "call_haystack.py")


def test_the_generators_own_defaults_are_sent_and_accepted(seen: Seen) -> None:
    sent = seen.sent("defaults")
    assert (sent.method, sent.path) == ("POST", "/")
    assert sent.body == {
        "inputs": PROMPT,
        "parameters": {"details": True, "max_new_tokens": 512, "stop": []},
        "stream": False,
    }
    answer, plain_answer = seen.value("defaults"), seen.plain("defaults")
    assert answer["replies"] == [PROMPT + plain_answer["generated_text"]]
    (meta,) = answer["meta"]
    assert meta["finish_reason"] == plain_answer["details"]["finish_reason"]
    assert meta["usage"] == {"completion_tokens": plain_answer["details"]["generated_tokens"]}


def test_every_parameter_passes_through(seen: Seen) -> None:
    assert seen.value("everything")["replies"] == [seen.plain("everything")["generated_text"]]


def test_a_callback_is_given_the_plain_answers_tokens(seen: Seen) -> None:
    chunks, answer = seen.value("stream")["chunks"], seen.value("stream")["answer"]
    tokens = seen.plain("stream")["details"]["tokens"]
    assert [chunk["content"] for chunk in chunks] == [token["text"] for token in tokens]
    assert [chunk["meta"]["id"] for chunk in chunks] == [token["id"] for token in tokens]
    assert [chunk["meta"]["logprob"] for chunk in chunks] == [token["logprob"] for token in tokens]
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * 11 + ["length"]
    assert answer["replies"] == ["".join(token["text"] for token in tokens)]
    (meta,) = answer["meta"]
    assert (meta["finish_reason"], meta["usage"]) == ("length", {"completion_tokens": 12})


def test_a_stop_word_ends_the_reply(seen: Seen) -> None:
    assert seen.sent("stop").body["parameters"]["stop"] == ["e"]
    answer = seen.value("stop")
    assert answer["meta"][0]["finish_reason"] == "stop_sequence"
    (reply,) = answer["replies"]
    assert reply == seen.plain("stop")["generated_text"]
    assert "e" in reply


def test_it_works_in_a_pipeline(seen: Seen) -> None:
    assert seen.sent("pipeline").body["inputs"] == PROMPT
    assert seen.value("pipeline")["replies"] == [PROMPT + seen.plain("pipeline")["generated_text"]]


@pytest.mark.parametrize(
    ("case", "error", "part"),
    [
        ("too_long", "ValidationError", TOO_LONG),
        ("too_long_stream", "ValidationError", TOO_LONG),
        ("overloaded", "OverloadedError", FULL),
    ],
)
def test_an_error_is_of_its_class_and_says_what_is_wrong(seen: Seen, case: str, error: str, part: str) -> None:
    failure = seen.failure(case)
    assert failure.name == error
    assert re.search(part, failure.message)
