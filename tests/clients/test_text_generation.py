"""text-generation 0.7.0, the protocol's own client: it calls `POST /` and sends every parameter, nulls included."""

from __future__ import annotations

import re

import pytest

from gyrfalcon.testing.server import ServerProcess
from tests.clients.observation import FULL, PROMPT, TOO_LONG, Observe, Seen, plain

BOTH = pytest.mark.parametrize("suffix", ["", "_async"], ids=["sync", "async"])


@pytest.fixture(scope="module")
def seen(observe: Observe) -> Seen:
    return observe("text-generation", "call_text_generation.py")


@BOTH
def test_a_call_without_parameters_sends_all_of_them(seen: Seen, suffix: str) -> None:
    sent = seen.sent("defaults" + suffix)
    assert (sent.method, sent.path) == ("POST", "/")
    assert sent.body == {
        "inputs": PROMPT,
        "parameters": {
            "best_of": None,
            "decoder_input_details": False,
            "details": True,
            "do_sample": False,
            "frequency_penalty": None,
            "grammar": None,
            "max_new_tokens": 20,
            "repetition_penalty": None,
            "return_full_text": False,
            "seed": None,
            "stop": [],
            "temperature": None,
            "top_k": None,
            "top_n_tokens": None,
            "top_p": None,
            "truncate": None,
            "typical_p": None,
            "watermark": False,
        },
        "stream": False,
    }


@BOTH
def test_an_answer_is_the_plain_one(seen: Seen, suffix: str) -> None:
    value, plain_answer = seen.value("defaults" + suffix), seen.plain("defaults" + suffix)
    assert value["generated_text"] == plain_answer["generated_text"]
    details = value["details"]
    assert details["tokens"] == plain_answer["details"]["tokens"]
    assert details["generated_tokens"] == len(details["tokens"])
    assert details["finish_reason"] == plain_answer["details"]["finish_reason"]
    assert (details["seed"], details["prefill"], details["top_tokens"]) == (None, [], None)


@BOTH
def test_every_parameter_passes_through(seen: Seen, suffix: str) -> None:
    parameters = seen.sent("everything" + suffix).body["parameters"]
    assert {name for name, value in parameters.items() if value in (None, False, [])} == {"best_of", "grammar", "stop"}
    value, plain_answer = seen.value("everything" + suffix), seen.plain("everything" + suffix)
    assert value["generated_text"] == PROMPT + plain_answer["generated_text"]
    assert value["details"] == {**plain_answer["details"], "best_of_sequences": None}
    assert value["details"]["seed"] == parameters["seed"]
    assert len(value["details"]["prefill"]) == parameters["truncate"]
    assert value["details"]["prefill"][0]["logprob"] is None


@BOTH
def test_a_stream_holds_the_plain_answers_tokens(seen: Seen, suffix: str) -> None:
    events, plain_answer = seen.value("stream" + suffix), seen.plain("stream" + suffix)
    assert [event["token"] for event in events] == plain_answer["details"]["tokens"]
    assert [event["top_tokens"] for event in events] == plain_answer["details"]["top_tokens"]
    assert {(event["generated_text"], event["details"]) for event in events[:-1]} == {(None, None)}
    assert events[-1]["generated_text"] == plain_answer["generated_text"]
    expected = {name: plain_answer["details"][name] for name in ("finish_reason", "generated_tokens", "seed")}
    assert events[-1]["details"] == expected


@BOTH
def test_a_stop_string_ends_the_text_and_stays_in_it(seen: Seen, suffix: str) -> None:
    value = seen.value("stop" + suffix)
    assert value["details"]["finish_reason"] == "stop_sequence"
    *earlier, last = [token["text"] for token in value["details"]["tokens"]]
    assert "e" in last
    assert "e" not in "".join(earlier)
    assert value["generated_text"] == "".join([*earlier, last])


@BOTH
def test_best_of_gives_as_many_sequences_each_of_its_own_seed(seen: Seen, server: ServerProcess, suffix: str) -> None:
    case = "best_of" + suffix
    best = seen.value(case)
    sequences = [best["details"] | {"generated_text": best["generated_text"]}, *best["details"]["best_of_sequences"]]
    assert len(sequences) == 3
    assert len({sequence["seed"] for sequence in sequences}) == 3
    for sequence in sequences:
        alone = plain(server, seen.sent(case), best_of=None, seed=sequence["seed"])
        assert sequence["generated_text"] == PROMPT + alone["generated_text"]
        assert sequence["tokens"] == alone["details"]["tokens"]
        assert sequence["finish_reason"] == alone["details"]["finish_reason"]


@pytest.mark.parametrize(
    ("case", "error", "part"),
    [
        ("too_long", "ValidationError", TOO_LONG),
        ("too_long_async", "ValidationError", TOO_LONG),
        ("too_long_stream", "ValidationError", TOO_LONG),
        ("too_long_stream_async", "ValidationError", TOO_LONG),
        ("too_many_stops", "ValidationError", "`stop` supports up to 8 stop sequences. Given: 9"),
        ("too_high_best_of", "ValidationError", "`best_of` must be > 0 and <= 4. Given: 100"),
        ("grammar", "ValidationError", "`grammar` is not supported"),
        ("wrong_key", "UnknownError", "wrong API key"),
        *(
            (case, "OverloadedError", FULL)
            for case in ("overloaded", "overloaded_async", "overloaded_stream", "overloaded_stream_async")
        ),
    ],
)
def test_an_error_is_of_its_class_and_says_what_is_wrong(seen: Seen, case: str, error: str, part: str) -> None:
    failure = seen.failure(case)
    assert failure.name == error
    assert re.search(part, failure.message)


def test_a_client_that_leaves_is_dropped(seen: Seen) -> None:
    assert seen.value("abandoned_stream")
    assert seen.value("cancelled_async")
