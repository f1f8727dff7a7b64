"""huggingface_hub's InferenceClient, in its 0.x, 1.x and 2.x lines: it sends what is given and nothing else."""

from __future__ import annotations

import re
from typing import Any

import pytest

from gyrfalcon.testing.server import ServerProcess
from tests.clients.observation import FULL, PROMPT, TOO_LONG, Observe, Seen, plain


# LangChain's environment holds the 1.x line.
@pytest.fixture(scope="module", params=["hub-0", "langchain", "hub-2"], ids=["0.x", "1.x", "2.x"])
def seen(request: pytest.FixtureRequest, observe: Observe) -> Seen:
    return observe(request.param, "call_hub.py")


def without_nulls(value: Any) -> Any:
    """The value without its members that are None: the client fills in what an answer lacks."""
    if isinstance(value, dict):
        return {key: without_nulls(member) for key, member in value.items() if member is not None}
    return [without_nulls(member) for member in value] if isinstance(value, list) else value


@pytest.mark.parametrize("case", ["defaults", "defaults_async"])
def test_a_call_without_parameters_sends_none_and_gets_the_prompt_back(seen: Seen, case: str) -> None:
    sent = seen.sent(case)
    assert (sent.method, sent.path) == ("POST", "/")
    assert sent.body == {"inputs": PROMPT, "parameters": {}}
    assert sent.headers["authorization"].startswith("Bearer ")
    assert seen.value(case) == PROMPT + seen.plain(case)["generated_text"]


def test_the_url_may_be_that_of_generate(seen: Seen) -> None:
    assert seen.sent("path_of_generate").path == "/generate"
    assert seen.value("path_of_generate") == seen.plain("path_of_generate")["generated_text"]


@pytest.mark.parametrize("case", ["details", "details_async"])
def test_every_parameter_passes_through(seen: Seen, case: str) -> None:
    parameters = seen.sent(case).body["parameters"]
    value, plain_answer = seen.value(case), seen.plain(case)
    assert value["generated_text"] == PROMPT + plain_answer["generated_text"]
    assert without_nulls(value["details"]) == without_nulls(plain_answer["details"])
    assert value["details"]["seed"] == parameters["seed"]
    assert value["details"]["generated_tokens"] == len(value["details"]["tokens"])
    assert len(value["details"]["prefill"]) == parameters["truncate"]
    assert len(value["details"]["top_tokens"]) == len(value["details"]["tokens"])


def test_the_text_alone_is_asked_for(seen: Seen) -> None:
    assert seen.value("text_alone") == seen.plain("text_alone")["generated_text"]


@pytest.mark.parametrize("case", ["stream_of_text", "stream_of_text_async"])
def test_a_stream_of_text_holds_the_plain_answers_tokens(seen: Seen, case: str) -> None:
    assert seen.sent(case).body["stream"] is True
    assert seen.value(case) == [token["text"] for token in seen.plain(case)["details"]["tokens"]]


@pytest.mark.parametrize("case", ["stream_of_details", "stream_of_details_async"])
def test_a_stream_of_details_ends_with_the_whole_text(seen: Seen, case: str) -> None:
    events, plain_answer = seen.value(case), seen.plain(case, decoder_input_details=True)
    assert [event["index"] for event in events] == list(range(1, len(events) + 1))
    assert [event["token"] for event in events] == plain_answer["details"]["tokens"]
    assert [event["top_tokens"] for event in events] == plain_answer["details"]["top_tokens"]
    assert {(event["generated_text"], event["details"]) for event in events[:-1]} == {(None, None)}
    assert events[-1]["generated_text"] == PROMPT + plain_answer["generated_text"]
    assert events[-1]["details"] == {
        "finish_reason": plain_answer["details"]["finish_reason"],
        "generated_tokens": len(events),
        "seed": plain_answer["details"]["seed"],
        "input_length": len(plain_answer["details"]["prefill"]),
    }


def test_a_stop_string_ends_the_text_and_stays_in_it(seen: Seen) -> None:
    value = seen.value("stop")
    assert value["details"]["finish_reason"] == "stop_sequence"
    last = value["details"]["tokens"][-1]["text"]
    assert "e" in last
    assert "e" not in value["generated_text"].removesuffix(last)


def test_best_of_gives_as_many_sequences_each_of_its_own_seed(seen: Seen, server: ServerProcess) -> None:
    best = seen.value("best_of")
    others = best["details"]["best_of_sequences"]
    texts = {sequence["seed"]: sequence["generated_text"] for sequence in others}
    texts[best["details"]["seed"]] = best["generated_text"]
    assert len(texts) == 3
    for seed, text in texts.items():
        alone = plain(server, seen.sent("best_of"), best_of=None, seed=seed)
        assert text == PROMPT + alone["generated_text"]


def test_values_that_mean_off_are_accepted_and_off(seen: Seen) -> None:
    assert seen.sent("off_values").body["parameters"]["top_p"] == 1.0
    assert seen.value("off_values") == seen.value("defaults")


@pytest.mark.parametrize(
    ("case", "error", "part"),
    [
        ("zero_temperature", "ValidationError", "`temperature` must be strictly positive"),
        ("too_high_best_of", "ValidationError", "Input validation error: `best_of` must be > 0 and <= 4"),
        ("too_long", "ValidationError", TOO_LONG),
        ("too_long_async", "ValidationError", TOO_LONG),
        ("too_long_stream", "ValidationError", TOO_LONG),
        ("too_long_stream_async", "ValidationError", TOO_LONG),
        ("wrong_type", "ValidationError", "top_k"),
        ("unknown_adapter", "ValidationError", "`adapter_id`"),
        ("overloaded", "OverloadedError", FULL),
        ("overloaded_async", "OverloadedError", FULL),
        ("overloaded_stream", "OverloadedError", FULL),
    ],
)
def test_an_error_is_of_its_class_and_says_what_is_wrong(seen: Seen, case: str, error: str, part: str) -> None:
    failure = seen.failure(case)
    assert failure.name == error
    assert re.search(part, failure.message)


def test_an_error_is_not_answered_with_a_second_try(seen: Seen) -> None:
    """The client drops parameters and tries again where an error of status 400 reads as if they were unknown."""
    assert len(seen.all_sent("wrong_type")) == len(seen.all_sent("unknown_adapter")) == 1


def test_a_wrong_key_is_refused(seen: Seen) -> None:
    assert seen.sent("wrong_key").headers["authorization"] == "Bearer wrong"
    assert seen.failure("wrong_key").message


def test_the_endpoints_info_and_health_are_read(seen: Seen, server: ServerProcess) -> None:
    assert seen.value("endpoint_info") == server.request("GET", "/info").json()
    assert seen.value("health") is True


def test_a_client_that_leaves_is_dropped(seen: Seen) -> None:
    assert seen.value("abandoned_stream")
    assert seen.value("cancelled_async")
