"""Section 2 of the checklist: whatever comes in is answered or refused as the client's mistake, at once and in JSON."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from gyrfalcon.errors import UnknownModel
from gyrfalcon.http.app import create_app
from gyrfalcon.http.connections import ConnectionLimits
from gyrfalcon.http.settings import HttpSettings
from gyrfalcon.http.wire import BodyLimits, MalformedBody, parse_json, quote, sse, to_json
from gyrfalcon.metrics import Metrics
from gyrfalcon.service.generation import GenerationService
from gyrfalcon.service.models import ModelTable, load_served_model
from gyrfalcon.service.validation import resolve_limits
from gyrfalcon.testing.engine import FakeEngine
from gyrfalcon.testing.text import text_service, write_tokenizer
from tests.reliability import bad_inputs
from tests.reliability.bad_inputs import GOOD, RAW, Row
from tests.reliability.house import send, status_of

from .conftest import MakeClient, OpenHouse

ROWS = bad_inputs.rows()
LONGEST_S = 5.0
# What an answer must not show: tracebacks, addresses in memory, files of the server.
LEAKS = re.compile(r"Traceback|0x[0-9a-f]{6,}|site-packages|\.py\b|/root/|/home/")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Any:
    service, metrics = text_service(FakeEngine(), write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    with TestClient(create_app(service, HttpSettings(), metrics), raise_server_exceptions=True) as made:
        yield made


def fault(client: TestClient, row: Row) -> str | None:
    """What is wrong with the answer to a row."""
    started = time.monotonic()
    answer = client.request(row.method, row.path, content=row.body, headers=list(row.headers))
    took_s = time.monotonic() - started
    text = answer.text
    if answer.status_code not in row.allowed:
        return f"{row.name}: status {answer.status_code}, {text[:200]}"
    if took_s > LONGEST_S:
        return f"{row.name}: took {took_s:.1f} s"
    if answer.status_code != 200:
        if answer.status_code not in {404, 405} and not isinstance(answer.json(), dict):
            return f"{row.name}: not an object"
        if len(text) > 1000 or LEAKS.search(text):
            return f"{row.name}: says too much: {text[:300]}"
    elif answer.headers.get("content-type", "").startswith("text/event-stream"):
        events = [json.loads(line[5:]) for line in text.splitlines() if line.startswith("data:")]
        last = events[-1]
        if not ("error" in last or "detail" in last or "Result" in last or last.get("generated_text") is not None):
            return f"{row.name}: the stream has no end"
    return None


def test_2_the_table_has_a_thousand_rows_over_all_routes() -> None:
    assert len(ROWS) >= 1000
    assert len({row.name for row in ROWS}) == len(ROWS)
    by_path = Counter(row.path for row in ROWS)
    assert all(by_path[path] >= 60 for path in GOOD)


def test_2_the_bodies_that_rows_differ_from_are_fine(client: TestClient) -> None:
    for path, body in GOOD.items():
        assert client.post(path, json=body).status_code == 200, path


@pytest.mark.parametrize("path", [*GOOD, None])
def test_2_no_bad_input_is_a_failure_of_the_server(client: TestClient, path: str | None) -> None:
    rows = [row for row in ROWS if row.path == path or (path is None and row.path not in GOOD)]
    assert rows
    assert [found for row in rows if (found := fault(client, row))] == []
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize("name", RAW)
async def test_2_no_bytes_on_the_wire_hurt_the_server(house: OpenHouse, name: str) -> None:
    limits = ConnectionLimits(header_timeout_s=0.5, body_timeout_s=0.5, idle_timeout_s=0.5)
    async with house(connections=limits, body_timeout_s=0.5) as server:
        answer = await asyncio.wait_for(send(server.port, RAW[name]), LONGEST_S)
        assert answer == b"" or status_of(answer) < 500, answer
        assert not LEAKS.search(answer.decode("latin-1"))
        assert server.engine.requests == []
        healthy = await send(server.port, b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert status_of(healthy) == 200


# The table of limits: each is a setting, and each holds


def refused(client: TestClient, path: str, body: Any, **headers: str) -> tuple[int, str]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post(path, content=content, headers={"Content-Type": "application/json", **headers})
    return answer.status_code, answer.text


def parameters(**values: Any) -> dict[str, Any]:
    return {"inputs": "x", "parameters": {"max_new_tokens": 1, **values}}


def test_2_body_bytes_also_when_they_come_in_chunks(make_client: MakeClient) -> None:
    client = make_client(payload_limit=100)

    def chunks() -> Any:
        for _ in range(30):
            yield b" " * 10

    assert refused(client, "/generate", b" " * 101)[0] == 413
    answer = client.post("/generate", content=chunks(), headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error_type"]) == (413, "payload_too_large")
    assert refused(client, "/generate", parameters())[0] == 200


def test_2_header_bytes_and_fields(make_client: MakeClient) -> None:
    client = make_client(max_header_bytes=1500, max_header_fields=20)
    assert client.get("/health", headers={"X": "y" * 1500}).status_code == 431
    assert client.get("/health", headers={f"X-{n}": "y" for n in range(20)}).status_code == 431
    assert client.get("/health", headers={f"X-{n}": "y" for n in range(10)}).status_code == 200


async def test_2_headers_without_end_are_refused_before_they_are_read(house: OpenHouse) -> None:
    async with house(connections=ConnectionLimits(max_header_bytes=2000)) as server:
        answer = await asyncio.wait_for(send(server.port, b"GET /health HTTP/1.1\r\nX: " + b"y" * 3000), 5)
        assert status_of(answer) == 431
        assert server.metric("gyrfalcon_connections_cut_total", cause="headers_too_large") == 1


def test_2_json_depth_and_digits(make_client: MakeClient) -> None:
    client = make_client(max_json_depth=8, max_json_digits=20)
    assert refused(client, "/generate", b'{"inputs":"x","a":' + b"[" * 7 + b"]" * 7 + b"}")[0] == 200
    assert refused(client, "/generate", b'{"inputs":"x","a":' + b"[" * 8 + b"]" * 8 + b"}")[0] == 400
    assert refused(client, "/generate", b'{"inputs":"x","a":' + b"1" * 20 + b"}")[0] == 200
    assert refused(client, "/generate", b'{"inputs":"x","a":' + b"1" * 21 + b"}")[0] == 400


def test_2_content_type_and_encoding(client: TestClient) -> None:
    assert refused(client, "/generate", parameters(), **{"Content-Type": "text/plain"})[0] == 415
    assert refused(client, "/generate", parameters(), **{"Content-Encoding": "gzip"})[0] == 415
    assert refused(client, "/generate", parameters(), **{"Content-Encoding": "identity"})[0] == 200


def test_2_prompts_of_a_request(make_client: MakeClient) -> None:
    client = make_client(max_prompts=2)
    instances = [{"inputs": "x", "parameters": {"max_new_tokens": 1}}]
    assert refused(client, "/vertex", {"instances": instances * 2})[0] == 200
    status, text = refused(client, "/vertex", {"instances": instances * 3})
    assert status == 422
    assert "instances: a request may have 2 prompts. Given: 3" in text


@pytest.mark.parametrize(
    ("limit", "value", "within", "beyond", "named"),
    [
        ("max_best_of", 2, {"best_of": 2, "do_sample": True}, {"best_of": 3, "do_sample": True}, "best_of"),
        (
            "max_return_sequences",
            2,
            {"num_return_sequences": 2, "do_sample": True},
            {"num_return_sequences": 3, "do_sample": True},
            "num_return_sequences",
        ),
        ("max_stop_sequences", 1, {"stop": ["a"]}, {"stop": ["a", "b"]}, "stop"),
        ("max_stop_length", 3, {"stop": ["abc"]}, {"stop": ["abcd"]}, "stop"),
        ("max_top_n_tokens", 2, {"top_n_tokens": 2}, {"top_n_tokens": 3}, "top_n_tokens"),
        ("max_bad_words", 1, {"bad_words_ids": [[1]]}, {"bad_words_ids": [[1], [2]]}, "bad_words_ids"),
        (
            "max_biased_phrases",
            1,
            {"sequence_bias": [[[1], 1.0]]},
            {"sequence_bias": [[[1], 1.0], [[2], 1.0]]},
            "sequence_bias",
        ),
        ("max_total_tokens", 20, {"max_new_tokens": 10}, {"max_new_tokens": 20}, "max_new_tokens"),
    ],
)
def test_2_each_limit_of_a_request_is_a_setting(
    make_client: MakeClient, limit: str, value: int, within: dict[str, Any], beyond: dict[str, Any], named: str
) -> None:
    engine = FakeEngine()
    client = make_client(engine, limits=resolve_limits(engine.facts, **{limit: value}))
    assert refused(client, "/generate", parameters(**within))[0] == 200
    status, text = refused(client, "/generate", parameters(**beyond))
    assert (status, f"`{named}`" in text) == (422, True)


def test_2_characters_are_counted_before_they_are_tokenised(make_client: MakeClient) -> None:
    engine = FakeEngine()
    client = make_client(engine, limits=resolve_limits(engine.facts, max_total_tokens=20, max_characters_per_token=2))
    assert refused(client, "/generate", {"inputs": "x" * 41, "parameters": {"truncate": 1}})[0] == 422
    assert (
        refused(client, "/generate", {"inputs": "x" * 40, "parameters": {"truncate": 1, "max_new_tokens": 1}})[0] == 200
    )


def test_2_messages_of_a_conversation(make_client: MakeClient) -> None:
    engine = FakeEngine()
    client = make_client(engine, limits=resolve_limits(engine.facts, max_messages=2))
    message = [{"role": "user", "content": "x"}]
    assert refused(client, "/chat_tokenize", {"messages": message * 2})[0] == 200
    assert refused(client, "/chat_tokenize", {"messages": message * 3})[0] == 422


def test_2_a_model_name_is_one_that_is_served_and_never_a_path(tokenizer_folder: Any) -> None:
    engine = FakeEngine()
    model = load_served_model("tiny", tokenizer_folder, engine, resolve_limits(engine.facts))
    service = GenerationService(ModelTable([model], strict_names=True), Metrics(), max_concurrent_requests=1)
    for name in ("other", "../tiny", "/etc/passwd", "http://x/tiny", "tiny\0", ""):
        with pytest.raises(UnknownModel):
            service.resolve(name)


# 2.1 to 2.5


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "true", '"1"', "[1]"])
def test_2_1_numbers_are_finite_and_numbers(client: TestClient, number: str) -> None:
    for name in ("temperature", "top_p", "repetition_penalty", "frequency_penalty"):
        body = f'{{"inputs":"x","parameters":{{"{name}":{number}}}}}'.encode()
        assert refused(client, "/generate", body)[0] in {400, 422}


def test_2_2_token_ids_are_the_models(client: TestClient) -> None:
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        for ids in ([512], [-1], [2**40]):
            status, text = refused(client, "/generate", parameters(**{name: ids}))
            assert (status, f"{name}" in text) == (422, True)


def test_2_3_conflicts_are_found_on_the_final_values(client: TestClient) -> None:
    # 20 new tokens are the default that was filled in.
    status, text = refused(client, "/generate", {"inputs": "x", "parameters": {"min_new_tokens": 21}})
    assert (status, "min_new_tokens" in text) == (422, True)
    assert refused(client, "/generate", parameters(num_beams=4, num_beam_groups=3))[0] == 422


@given(st.text(st.characters(), max_size=30))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_2_4_any_text_is_answered_or_refused(client: TestClient, text: str) -> None:
    body = json.dumps({"inputs": "x" + text, "parameters": {"max_new_tokens": 1}}).encode()
    assert refused(client, "/generate", body)[0] in {200, 400, 422}


@given(st.recursive(st.none() | st.floats() | st.text(st.characters()), st.lists, max_leaves=5))
@settings(max_examples=100)
def test_2_4_the_writer_of_errors_survives_what_it_quotes(value: Any) -> None:
    shown = quote(value)
    assert len(shown) <= 203
    json.loads(to_json({"error": shown}))


def test_2_5_what_a_stream_reports_is_one_event_and_the_end(client: TestClient) -> None:
    status, text = refused(client, "/generate_stream", parameters(temperature=-1))
    assert (status, text.count("data:"), text.endswith("\n\n")) == (200, 1, True)
    assert refused(client, "/generate_stream", b"{")[0] == 400


# Parsers


@given(st.binary(max_size=200))
@settings(max_examples=300)
def test_7_4_the_reader_of_json_raises_one_kind_of_error(body: bytes) -> None:
    value: Any = None
    with contextlib.suppress(MalformedBody):
        value = parse_json(body, BodyLimits())
    if value is not None:
        assert to_json(value) == to_json(json.loads(body))


@given(st.text())
@settings(max_examples=200)
def test_7_4_an_event_is_one_line(text: str) -> None:
    event = sse({"text": text})
    assert event.endswith(b"\n\n")
    assert len(event.decode().splitlines()) == 2
    assert json.loads(event[5:]) == {"text": text}
