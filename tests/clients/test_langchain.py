"""LangChain over the hub's client (HuggingFaceEndpoint) and over text-generation's (HuggingFaceTextGenInference).

Both send a temperature, a top_p and a typical_p of their own, so they sample although `do_sample` is false.
"""

from __future__ import annotations

import re

import pytest

from gyrfalcon.testing.server import ServerProcess
from tests.clients.observation import FULL, PROMPT, TOO_LONG, Observe, Seen, plain

DEFAULTS = {
    "do_sample": False,
    "max_new_tokens": 512,
    "return_full_text": False,
    "stop": [],
    "temperature": 0.8,
    "top_p": 0.95,
    "typical_p": 0.95,
    "watermark": False,
}


@pytest.fixture(scope="module", params=["endpoint", "community"])
def package(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def seen(package: str, observe: Observe) -> Seen:
    if package == "endpoint":
        return observe("langchain", "call_langchain.py")
    return observe("langchain-community", "call_langchain.py", "community")


def test_the_models_own_defaults_are_sent_and_accepted(seen: Seen) -> None:
    sent = seen.sent("defaults")
    parameters = {name: value for name, value in sent.body["parameters"].items() if value is not None}
    # The older of the two asks for details always.
    assert {name: value for name, value in parameters.items() if "details" not in name} == DEFAULTS
    assert (sent.method, sent.path, sent.body["inputs"]) == ("POST", "/", PROMPT)
    assert isinstance(seen.value("defaults"), str)
    # The defaults sample: an answer has a seed.
    assert isinstance(seen.plain("defaults", max_new_tokens=1)["details"]["seed"], int)


@pytest.mark.parametrize("case", ["everything", "everything_async", "streaming_invoke"])
def test_every_parameter_passes_through(seen: Seen, case: str) -> None:
    parameters = seen.sent(case).body["parameters"]
    assert (parameters["top_k"], parameters["truncate"], parameters["watermark"]) == (40, 4, True)
    assert seen.value(case) == seen.plain(case)["generated_text"]


def test_the_prompt_is_in_the_text_when_asked_for(seen: Seen) -> None:
    assert seen.value("full_text") == PROMPT + seen.plain("full_text")["generated_text"]


@pytest.mark.parametrize("case", ["stream", "stream_async"])
def test_a_stream_holds_the_plain_answers_tokens(seen: Seen, case: str) -> None:
    texts = [token["text"] for token in seen.plain(case)["details"]["tokens"] if not token["special"]]
    assert [text for text in seen.value(case) if text] == [text for text in texts if text]


@pytest.mark.parametrize("case", ["stop", "stop_stream"])
def test_the_text_ends_where_the_stop_string_begins(seen: Seen, package: str, case: str) -> None:
    answer = seen.plain(case)
    assert answer["details"]["finish_reason"] == "stop_sequence"
    text = answer["generated_text"]
    # The endpoint takes a stop string away from a whole text's end only, as the server has always cut there.
    expected = text.removesuffix("e") if (package, case) == ("endpoint", "stop") else text[: text.index("e")]
    assert "".join(seen.value(case)) == expected


def test_a_batch_is_answered_in_its_order(seen: Seen, server: ServerProcess) -> None:
    texts = {sent.body["inputs"]: plain(server, sent)["generated_text"] for sent in seen.all_sent("batch")}
    assert seen.value("batch") == [texts[prompt] for prompt in (PROMPT, "Raise an error", "The value")]


@pytest.mark.parametrize(
    ("case", "error", "part"),
    [
        ("too_long", "ValidationError", TOO_LONG),
        ("overloaded", "OverloadedError", FULL),
    ],
)
def test_an_error_is_of_its_class_and_says_what_is_wrong(seen: Seen, case: str, error: str, part: str) -> None:
    failure = seen.failure(case)
    assert failure.name == error
    assert re.search(part, failure.message)
