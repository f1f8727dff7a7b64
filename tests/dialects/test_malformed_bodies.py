"""What each dialect answers to bodies that are wrong: status, shape, and the name of what is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from gyrfalcon.testing.engine import FakeEngine

KEY = {"Authorization": "Bearer KEY"}
JSON = {"Content-Type": "application/json"}

PARSE = "Failed to parse the request body as JSON: "
SHAPE = "Failed to deserialize the JSON body into the target type: "
RULE = "Input validation error: "

# Bodies that are not what JSON allows, with the status that says so.
UNREADABLE: list[tuple[bytes, int, str]] = [
    (b"", 400, PARSE),
    (b"   ", 400, PARSE),
    (b"hello", 400, PARSE),
    (b"{", 400, PARSE),
    (b'{"inputs"', 400, PARSE),
    (b'{"inputs":', 400, PARSE),
    (b'{"inputs":"x"', 400, PARSE),
    (b'{"inputs":"x"}}', 400, PARSE),
    (b'{"inputs":"x"}{"inputs":"y"}', 400, PARSE),
    (b"{'inputs':'x'}", 400, PARSE),
    (b'{inputs:"x"}', 400, PARSE),
    (b'{"inputs":"x",}', 400, PARSE),
    (b'{"inputs":"\x00"}', 400, PARSE),
    (b'{"inputs":"a\nb"}', 400, PARSE),
    (b'{"inputs":"\\q"}', 400, PARSE),
    (b'{"inputs":"\xff"}', 400, PARSE),
    (b'{"inputs":"\xed\xa0\x80"}', 400, PARSE),
    (b'{"inputs":"x","parameters":{"temperature":NaN}}', 400, PARSE),
    (b'{"inputs":"x","parameters":{"temperature":Infinity}}', 400, PARSE),
    (b'{"inputs":"x","parameters":{"temperature":-Infinity}}', 400, PARSE),
    (b'{"inputs":"x","parameters":{"temperature":1e999}}', 400, PARSE),
    (b'{"inputs":"x","parameters":{"seed":' + b"9" * 101 + b"}}", 400, PARSE),
    (b'{"inputs":"x","parameters":{"top_k":01}}', 400, PARSE),
    (b'{"inputs":"x","parameters":{"top_k":+1}}', 400, PARSE),
    (b'{"inputs":"x","extra":' + b"[" * 64 + b"]" * 64 + b"}", 400, PARSE),
    (b'{"a":' * 65 + b"1" + b"}" * 65, 400, PARSE),
    (b"[" * 200_000, 400, PARSE),
    (b'{"inputs":"x","inputs":"y"}', 422, SHAPE),
    (b'{"inputs":"x","parameters":{"seed":1,"seed":2}}', 422, SHAPE),
    (b'{"inputs":"\\ud800"}', 400, PARSE),
    (b'{"inputs":"x","\\udc00":1}', 400, PARSE),
    (b'{"inputs":"x","parameters":{"stop":["\\ud83d"]}}', 400, PARSE),
]

# Values that a field's type does not have: one row a value.
WRONG_TYPES: dict[str, list[Any]] = {
    "best_of": ["1", 1.0, -1, True, [1], 2**64],
    "decoder_input_details": [None, 1, 0, "true", []],
    "details": [None, 1, "false"],
    "do_sample": [None, 1, "true", {}],
    "frequency_penalty": ["0.5", True, []],
    "max_new_tokens": ["20", 20.0, 20.5, -1, True, 2**32, [20], {}],
    "repetition_penalty": ["1.03", False, [1.0]],
    "return_full_text": [1, "true"],
    "seed": ["1", 1.0, -1, True, 2**64],
    "stop": [None, "photographer", [1], [None], {}, [["a"]]],
    "temperature": ["0.5", True, [], {}],
    "top_k": ["10", 10.0, True, 2**31, -(2**31) - 1],
    "top_n_tokens": ["1", 1.5, -1, True, 2**32],
    "top_p": ["0.95", True, []],
    "truncate": ["1", 1.0, -1, False, 2**64],
    "typical_p": ["0.95", True],
    "watermark": [None, 1, "true"],
    "adapter_id": [1, True],
}

# Values of the right type that break a rule.
BROKEN_RULES: list[tuple[str, dict[str, Any]]] = [
    ("best_of", {"best_of": 5, "do_sample": True}),
    ("best_of", {"best_of": 2**64 - 1, "do_sample": True}),
    ("best_of", {"best_of": 2}),
    ("seed", {"best_of": 2, "do_sample": True, "seed": 0}),
    ("temperature", {"temperature": 0}),
    ("temperature", {"temperature": 0.0}),
    ("temperature", {"temperature": -1}),
    ("temperature", {"temperature": 1e-50}),
    ("temperature", {"temperature": 1e300}),
    ("repetition_penalty", {"repetition_penalty": 0}),
    ("repetition_penalty", {"repetition_penalty": -1.5}),
    ("repetition_penalty", {"repetition_penalty": 1e39}),
    ("frequency_penalty", {"frequency_penalty": 2.1}),
    ("frequency_penalty", {"frequency_penalty": -2.1}),
    ("frequency_penalty", {"frequency_penalty": 1e300}),
    ("top_p", {"top_p": 0}),
    ("top_p", {"top_p": 1.0001}),
    ("top_p", {"top_p": -0.5}),
    ("typical_p", {"typical_p": 0.0}),
    ("typical_p", {"typical_p": 2}),
    ("top_k", {"top_k": 0}),
    ("top_k", {"top_k": -1}),
    ("max_new_tokens", {"max_new_tokens": 0}),
    ("max_new_tokens", {"max_new_tokens": 256}),
    ("max_new_tokens", {"max_new_tokens": 2**32 - 1}),
    ("stop", {"stop": list("abcdefghi")}),
    ("stop", {"stop": ["x" * 257]}),
    ("top_n_tokens", {"top_n_tokens": 21}),
    ("top_n_tokens", {"top_n_tokens": 2**32 - 1}),
    ("truncate", {"truncate": 0}),
    ("truncate", {"truncate": 256}),
    ("grammar", {"grammar": {"type": "regex", "value": "a"}}),
    ("grammar", {"grammar": "x"}),
    ("adapter_id", {"adapter_id": "mine"}),
]

TGI_PATHS = ("/generate", "/generate_stream", "/")


def send(client: TestClient, path: str, body: bytes, headers: dict[str, str] = JSON) -> Any:
    return client.post(path, content=body, headers=KEY | headers)


def check_error(answer: Any, status: int, kind: str) -> str:
    """The error's text, after its shape has been checked."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.json()) == ["error", "error_type"]
    assert answer.json()["error_type"] == kind
    text = answer.json()["error"]
    assert len(text) < 600
    assert "Traceback" not in text
    return str(text)


@pytest.mark.parametrize(("body", "status", "start"), UNREADABLE)
@pytest.mark.parametrize("path", TGI_PATHS)
def test_an_unreadable_body(
    client: TestClient, engine: FakeEngine, path: str, body: bytes, status: int, start: str
) -> None:
    kind = {400: "bad_request", 422: "validation"}[status]
    assert check_error(send(client, path, body), status, kind).startswith(start)
    assert engine.requests == []


@pytest.mark.parametrize(("body", "status"), [(body, status) for body, status, _ in UNREADABLE])
def test_an_unreadable_body_at_chat(client: TestClient, engine: FakeEngine, body: bytes, status: int) -> None:
    answer = send(client, "/chat", body.replace(b"inputs", b"prompt").replace(b"parameters", b"generate_kwargs"))
    assert (answer.status_code, list(answer.json())) == (422, ["detail"])
    assert answer.json()["detail"][0]["loc"][0] == "body"
    assert engine.requests == []


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG_TYPES.items() for value in values])
@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_value_of_the_wrong_type(client: TestClient, path: str, name: str, value: object) -> None:
    body = json.dumps({"inputs": "x", "parameters": {name: value}}).encode()
    text = check_error(send(client, path, body), 422, "validation")
    assert text.startswith(f"{SHAPE}parameters.{name}")


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"[]", "the body"),
        (b"3", "the body"),
        (b"null", "the body"),
        (b'"x"', "the body"),
        (b"true", "the body"),
        (b"{}", "inputs"),
        (b'{"parameters":{}}', "inputs"),
        (b'{"Inputs":"x"}', "inputs"),
        (b'{"inputs":null}', "inputs"),
        (b'{"inputs":3}', "inputs"),
        (b'{"inputs":["x"]}', "inputs"),
        (b'{"inputs":{"text":"x"}}', "inputs"),
        (b'{"inputs":"x","parameters":null}', "parameters"),
        (b'{"inputs":"x","parameters":[]}', "parameters"),
        (b'{"inputs":"x","parameters":"greedy"}', "parameters"),
        (b'{"inputs":"x","model":3}', "model"),
    ],
)
def test_a_body_of_the_wrong_shape(client: TestClient, body: bytes, named: str) -> None:
    text = check_error(send(client, "/generate", body), 422, "validation")
    assert text.startswith(f"{SHAPE}{named}: ")


@pytest.mark.parametrize(("name", "parameters"), BROKEN_RULES)
def test_a_broken_rule(client: TestClient, engine: FakeEngine, name: str, parameters: dict[str, Any]) -> None:
    body = json.dumps({"inputs": "x", "parameters": parameters}).encode()
    text = check_error(send(client, "/generate", body), 422, "validation")
    assert text.startswith(RULE)
    assert f"`{name}`" in text
    assert engine.requests == []


@pytest.mark.parametrize(("name", "parameters"), BROKEN_RULES)
def test_a_broken_rule_on_a_stream(client: TestClient, name: str, parameters: dict[str, Any]) -> None:
    # Ranking is refused on a stream before anything that goes with it is looked at.
    name = "best_of" if "best_of" in parameters else name
    body = json.dumps({"inputs": "x", "parameters": parameters}).encode()
    answer = send(client, "/generate_stream", body)
    assert answer.status_code == 200
    (event,) = [json.loads(line[6:]) for line in answer.text.splitlines() if line]
    assert event["error_type"] == "validation"
    assert f"`{name}`" in event["error"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "multipart/form-data; boundary=x"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ],
)
@pytest.mark.parametrize("path", TGI_PATHS)
def test_another_content_type(client: TestClient, path: str, headers: dict[str, str]) -> None:
    text = check_error(send(client, path, b'{"inputs":"x"}', headers), 415, "unsupported_media_type")
    assert "application/json" in text or "Content-Encoding" in text


@pytest.mark.parametrize("path", TGI_PATHS)
def test_too_large_a_body(client: TestClient, path: str) -> None:
    body = b'{"inputs":"' + b"x" * 2_000_000 + b'"}'
    assert "2000000 bytes" in check_error(send(client, path, body), 413, "payload_too_large")


def test_an_offending_value_is_quoted_in_part_only(client: TestClient) -> None:
    body = json.dumps({"inputs": "x", "parameters": {"temperature": "\u202e" + "y" * 100_000}}).encode()
    text = check_error(send(client, "/generate", body), 422, "validation")
    assert "\\u202e" in text
