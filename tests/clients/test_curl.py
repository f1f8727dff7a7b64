"""Plain curl, as the documents show it and as people use it beyond that."""

from __future__ import annotations

import http.client
import io
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gyrfalcon.testing.server import Answer, ServerProcess
from tests.clients.observation import CLIENTS_ARE_REQUIRED, KEY, PROMPT, generate

# The calls of the two documents that the server implements, as they stand there.
GENERATE = """{
 "model": "eyas", "inputs": "My name is Olivier and I",
 "parameters": {"best_of": 1, "decoder_input_details": true, "details": true, "do_sample": false, "max_new_tokens": 20,
  "repetition_penalty": 1.03, "return_full_text": false, "seed": null, "stop": ["photographer"], "temperature": 0.5,
  "top_k": 10, "top_p": 0.95, "truncate": null, "typical_p": 0.95, "watermark": true}}"""
CHAT = """{
 "prompt": "YOUR_PROMPT_HERE", "return_full_text": false, "clean_up_tokenization_spaces": false, "prefix": null,
 "handle_long_generation": null,
 "generate_kwargs": {"max_length": 200, "min_length": 0, "do_sample": true, "early_stopping": false, "num_beams": 1,
  "num_beam_groups": 1, "diversity_penalty": 0.0, "temperature": 1.0, "top_k": 10, "top_p": 1, "typical_p": 1,
  "repetition_penalty": 1, "length_penalty": 1, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
  "bad_words_ids": null, "num_return_sequences": 1, "output_scores": false, "return_dict_in_generate": false,
  "forced_bos_token_id": null, "forced_eos_token_id": null, "remove_invalid_values": null}}"""
JSON = ("-H", "Content-Type: application/json")
WITH_KEY = ("-H", f"Authorization: Bearer {KEY}")
SHORT = json.dumps({"inputs": PROMPT, "parameters": {"max_new_tokens": 6}})
# Tokens of the prompt are made likely, and the end is not among them.
ENDLESS = json.dumps(
    {"inputs": "of the number " * 24, "parameters": {"max_new_tokens": 700, "repetition_penalty": 0.2}}
)

Curl = Callable[..., Answer]


@pytest.fixture(scope="session")
def curl_program() -> str:
    program = shutil.which("curl")
    if program is None:
        pytest.fail("curl is not there") if CLIENTS_ARE_REQUIRED else pytest.skip("curl is not there")
    return program


@pytest.fixture
def curl(curl_program: str, server: ServerProcess, tmp_path: Path) -> Curl:
    """curl(path, *arguments): the last answer's status, headers and body. Fails where curl does."""

    def call(path: str, *arguments: str) -> Answer:
        head = tmp_path / "head"
        command = [curl_program, "-sS", "--dump-header", str(head), *arguments, f"http://127.0.0.1:{server.port}{path}"]
        ended = subprocess.run(command, capture_output=True, timeout=60, check=False)
        assert ended.returncode == 0, ended.stderr
        # One block an answer: a 100 before the others, one for each URL.
        *_, last = head.read_bytes().strip().split(b"\r\n\r\n")
        status, _, fields = last.partition(b"\r\n")
        headers = {name.lower(): value for name, value in http.client.parse_headers(io.BytesIO(fields)).items()}
        return Answer(int(status.split()[1]), headers, ended.stdout)

    return call


def num_dropped(server: ServerProcess) -> int:
    lines = server.request("GET", "/metrics").body.decode().splitlines()
    (line,) = [line for line in lines if line.startswith('tgi_request_failure{err="dropped"}')] or [" 0"]
    return int(float(line.rsplit(" ", 1)[1]))


def repeated(server: ServerProcess, request: str, seed: int) -> Any:
    """What `/generate` says to the same request with this seed."""
    body = json.loads(request)
    return generate(server, body["inputs"], **body["parameters"] | {"seed": seed}).json()


def test_the_documented_generate_call(curl: Curl, server: ServerProcess) -> None:
    answer = curl("/generate", "-X", "POST", *JSON, *WITH_KEY, "-d", GENERATE)
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert "".join(token["text"] for token in body["details"]["prefill"]) == "My name is Olivier and I"
    assert answer.headers["x-prompt-tokens"] == str(len(body["details"]["prefill"]))
    assert answer.headers["x-generated-tokens"] == str(body["details"]["generated_tokens"])
    # The temperature implies sampling; the seed that was drawn gives the same text again.
    assert repeated(server, GENERATE, body["details"]["seed"]) == body


def test_the_documented_stream_call(curl: Curl, server: ServerProcess) -> None:
    request = GENERATE.replace('"decoder_input_details": true', '"decoder_input_details": false')
    answer = curl("/generate_stream", "-N", "-X", "POST", *JSON, *WITH_KEY, "-d", request)
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers["x-accel-buffering"] == "no"
    frames = answer.body.removesuffix(b"\n\n").split(b"\n\n")
    assert all(frame.startswith(b"data: {") and b"\n" not in frame for frame in frames)
    events = answer.events()
    again = repeated(server, request, events[-1]["details"]["seed"])
    assert [event["token"] for event in events] == again["details"]["tokens"]
    assert events[-1]["generated_text"] == again["generated_text"]


def test_the_documented_chat_call(curl: Curl) -> None:
    answer = curl("/chat", "-X", "POST", "-H", "accept: application/json", *JSON, *WITH_KEY, "-d", CHAT)
    assert answer.status == 200
    assert list(answer.json()) == ["Result"]


def test_curls_own_content_type_is_refused_by_name(curl: Curl) -> None:
    answer = curl("/generate", *WITH_KEY, "-d", SHORT)
    assert answer.status == 415
    assert "Content-Type: application/json" in answer.json()["error"]


@pytest.mark.parametrize("path", ["/", "/health", "/ping", "/info", "/metrics"])
def test_what_is_open_needs_no_key_and_has_a_head(curl: Curl, path: str) -> None:
    got, head = curl(path), curl(path, "--head")
    assert (got.status, head.status) == (200, 200)
    assert head.body.endswith(b"\r\n\r\n")  # where the head ends; curl shows it
    assert head.headers.get("content-type") == got.headers.get("content-type")


def test_no_key_and_a_wrong_key_are_refused(curl: Curl) -> None:
    for arguments in ((), ("-H", "Authorization: Bearer wrong"), ("-u", f"user:{KEY}")):
        answer = curl("/generate", *JSON, "-d", SHORT, *arguments)
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == "Bearer"


def test_unknown_paths_and_methods_are_answered_without_a_body(curl: Curl) -> None:
    unknown = curl("/nothing-here", *WITH_KEY)
    assert (unknown.status, unknown.body) == (404, b"")
    slash = curl("/generate/", *JSON, *WITH_KEY, "-d", SHORT)
    assert (slash.status, slash.body) == (404, b"")
    method = curl("/generate", *WITH_KEY)
    assert (method.status, method.body, method.headers["allow"]) == (405, b"", "POST")


def test_a_browsers_preflight_is_answered_without_a_key(curl: Curl) -> None:
    arguments = ("-H", "Origin: http://example.org", "-H", "Access-Control-Request-Method: POST")
    asked = ("-H", "Access-Control-Request-Headers: authorization,content-type")
    answer = curl("/generate", "-X", "OPTIONS", *arguments, *asked)
    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] in {"*", "http://example.org"}
    assert "POST" in answer.headers["access-control-allow-methods"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--http1.0",),
        ("-H", "Transfer-Encoding: chunked"),
        ("-H", "Expect: 100-continue"),
        ("--compressed",),
        ("-H", "Connection: close"),
        ("-H", "Content-Type: application/json; charset=utf-8"),
    ],
    ids=["http 1.0", "body in chunks", "expects 100", "compressed", "closing", "charset"],
)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_other_ways_to_send_get_the_same_answer(curl: Curl, path: str, arguments: tuple[str, ...]) -> None:
    plain = curl(path, *JSON, *WITH_KEY, "-d", SHORT)
    content_type = () if "charset" in arguments[-1] else JSON
    answer = curl(path, *content_type, *WITH_KEY, "-d", SHORT, *arguments)
    assert (answer.status, answer.body) == (200, plain.body)


def test_a_connection_serves_several_requests(curl: Curl, server: ServerProcess) -> None:
    second_url = f"http://127.0.0.1:{server.port}/generate_stream"
    answer = curl("/generate", "--write-out", "<%{num_connects}>", *JSON, *WITH_KEY, "-d", SHORT, second_url)
    assert answer.status == 200
    assert re.findall(rb"<\d>", answer.body) == [b"<1>", b"<0>"]


def test_a_body_beyond_the_limit_is_refused(curl: Curl, tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_text(json.dumps({"inputs": "x" * 2_000_000}))
    answer = curl("/generate", *JSON, *WITH_KEY, "--data-binary", f"@{body}")
    assert answer.status == 413
    assert "2000000 bytes" in answer.json()["error"]


def test_a_large_body_that_waits_to_be_asked_for_is_read(curl: Curl, tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_text(json.dumps({"inputs": PROMPT, "ignored": "x" * 1_500_000, "parameters": {"max_new_tokens": 6}}))
    answer = curl("/generate", *JSON, *WITH_KEY, "--data-binary", f"@{body}")
    assert (answer.status, answer.body) == (200, curl("/generate", *JSON, *WITH_KEY, "-d", SHORT).body)


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_an_interrupted_request_is_dropped(curl_program: str, server: ServerProcess, path: str) -> None:
    before = num_dropped(server)
    url = f"http://127.0.0.1:{server.port}{path}"
    command = [curl_program, "-sS", "--max-time", "0.3", *JSON, *WITH_KEY, "-d", ENDLESS, url]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 28
    deadline = time.monotonic() + 20
    while num_dropped(server) == before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
