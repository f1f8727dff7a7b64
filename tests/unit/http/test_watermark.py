"""POST /watermark/detect: its answers, its refusals, and that no key comes out."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from gyrfalcon.engine.interface import WatermarkParams
from gyrfalcon.http.watermark import DetectResponse
from gyrfalcon.service.tokenizer import load_tokenizer
from gyrfalcon.splitmix import are_green

from .conftest import MakeClient

PATH = "/watermark/detect"
SERVER_KEY = WatermarkParams().key


def green_ids(length: int, key: int, gamma: float = 0.5) -> list[int]:
    """Ids of which each is green after the one before, no pair twice."""
    ids, seen = [3], set[tuple[int, int]]()
    while len(ids) < length:
        is_green = are_green(key, gamma, np.full(400, ids[-1]), np.arange(400))
        fresh = next(int(id_) for id_ in np.flatnonzero(is_green)[::-1] if (ids[-1], int(id_)) not in seen)
        seen.add((ids[-1], fresh))
        ids.append(fresh)
    return ids


def test_a_marked_text_is_found_by_the_server_s_own_key(client: TestClient) -> None:
    ids = green_ids(40, SERVER_KEY)
    answer = client.post(PATH, json={"token_ids": ids})
    assert answer.status_code == 200
    body = answer.json()
    assert DetectResponse.model_validate(body, strict=True, extra="forbid").is_watermarked is True
    assert (body["model"], body["gamma"], body["alpha"], body["tokens_scored"]) == ("tiny", 0.5, 0.0001, 39)
    assert body["reason"] is None
    (score,) = body["keys"]
    assert (score["green_tokens"], score["green_fraction"], score["is_watermarked"]) == (39, 1.0, True)
    assert score["z_score"] == pytest.approx(39**0.5)
    assert score["p_value"] == score["corrected_p_value"] == pytest.approx(0.5**39)
    assert score["green"] == [None, *[True] * 39]
    assert [token["id"] for token in body["tokens"]] == ids


def test_no_answer_holds_a_key(client: TestClient) -> None:
    ids = green_ids(40, SERVER_KEY)
    for body in ({"token_ids": ids}, {"token_ids": ids, "keys": [SERVER_KEY, 5]}, {"token_ids": ids, "gamma": 2.0}):
        assert str(SERVER_KEY) not in client.post(PATH, json=body).text


def test_several_keys_are_judged_together_in_their_order(client: TestClient) -> None:
    body = client.post(PATH, json={"token_ids": green_ids(60, 2**64 - 1, 0.25), "keys": [1, 2**64 - 1], "gamma": 0.25})
    assert [score["is_watermarked"] for score in body.json()["keys"]] == [False, True]
    assert body.json()["is_watermarked"] is True


def test_a_text_is_tokenised_as_the_model_does(client: TestClient, tokenizer_folder: Any) -> None:
    text, prompt = "and the people of the town look up", "My name"
    body = client.post(PATH, json={"text": text, "prompt": prompt, "model": "tiny"}).json()
    ids = load_tokenizer(tokenizer_folder).encode(text)
    assert [token["id"] for token in body["tokens"]] == ids
    assert "".join(token["text"] for token in body["tokens"]) == text
    prompt_ids = load_tokenizer(tokenizer_folder).encode(prompt)
    same = client.post(PATH, json={"token_ids": ids, "prompt_token_ids": prompt_ids}).json()
    assert same == body
    assert body["keys"][0]["green"][0] is not None


def test_repeated_pairs_count_once_unless_asked_for(client: TestClient) -> None:
    ids = [3, 4] * 20
    assert client.post(PATH, json={"token_ids": ids}).json()["tokens_scored"] == 2
    assert client.post(PATH, json={"token_ids": ids, "ignore_repeated": False}).json()["tokens_scored"] == 39


def test_too_few_tokens_are_an_answer_with_a_reason(client: TestClient) -> None:
    answer = client.post(PATH, json={"token_ids": [3, 4, 5]})
    assert answer.status_code == 200
    assert (answer.json()["is_watermarked"], answer.json()["keys"][0]["is_watermarked"]) == (None, None)
    assert answer.json()["reason"].startswith("2 tokens can be scored")
    lone = client.post(PATH, json={"token_ids": [3]}).json()["keys"][0]
    assert (lone["z_score"], lone["green_fraction"], lone["p_value"]) == (None, None, 1.0)


def test_alpha_moves_the_decision(client: TestClient) -> None:
    ids = green_ids(11, SERVER_KEY)
    assert client.post(PATH, json={"token_ids": ids, "alpha": 0.01}).json()["is_watermarked"] is True
    assert client.post(PATH, json={"token_ids": ids, "alpha": 0.0001}).json()["is_watermarked"] is None


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "`text` or `token_ids` must be given"),
        ({"text": None, "token_ids": None}, "`text` or `token_ids` must be given"),
        ({"text": "x", "token_ids": [1]}, "`text` and `token_ids` must not both be given"),
        ({"text": "x", "prompt": "x", "prompt_token_ids": [1]}, "`prompt` and `prompt_token_ids` must not both"),
        ({"text": ""}, "`text` must not be empty"),
        ({"token_ids": []}, "`token_ids` must not be empty"),
        ({"text": "x", "prompt": ""}, "`prompt` must not be empty"),
        ({"token_ids": [1, 512]}, "`token_ids` holds 512 at position 1; the model's ids are 0 to 511"),
        ({"token_ids": [-1]}, "`token_ids` holds -1 at position 0"),
        ({"token_ids": [2**90]}, "`token_ids` holds 1237940039285380274899124224 at position 0"),
        ({"token_ids": [True]}, "token_ids.0"),
        ({"token_ids": [1.0]}, "token_ids.0"),
        ({"token_ids": "1"}, "token_ids"),
        ({"text": 1}, "text"),
        ({"text": "x" * 200_001}, "`text` may have 200000 characters. Given: 200001"),
        ({"token_ids": [1] * 50_001}, "`token_ids` may have 50000 token ids. Given: 50001"),
        ({"text": "x", "keys": []}, "`keys` may have 1 to 16 entries. Given: 0"),
        ({"text": "x", "keys": [1, 1]}, "`keys` must differ; entry 1 is the same as entry 0"),
        ({"text": "x", "keys": [2**64]}, "`keys` must be >= 0 and below 2^64; entry 0 is not"),
        ({"text": "x", "keys": ["1"]}, "keys.0"),
        ({"text": "x", "keys": 1}, "keys"),
        ({"text": "x", "gamma": 1}, "`gamma` must be > 0.0 and < 1.0"),
        ({"text": "x", "gamma": "0.5"}, "gamma"),
        ({"text": "x", "alpha": 0}, "`alpha` must be >= 1e-100 and < 1.0. Given: 0.0"),
        ({"text": "x", "alpha": True}, "alpha"),
        ({"text": "x", "ignore_repeated": 1}, "ignore_repeated"),
        ({"text": "x", "delta": 2}, "delta: Extra inputs are not permitted"),
        ({"text": "x", "model": 3}, "model"),
        ([], "the body"),
        (None, "the body"),
    ],
)
def test_a_bad_member_is_named(client: TestClient, body: Any, named: str) -> None:
    answer = client.post(PATH, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert set(answer.json()) == {"error", "error_type"}
    assert answer.json()["error_type"] == "validation"
    assert named in answer.json()["error"]


@pytest.mark.parametrize(
    ("content", "status"), [(b"{", 400), (b'{"text": "x", "alpha": 1e999}', 400), (b'{"text": 1, "text": 2}', 422)]
)
def test_what_is_no_json_is_refused_and_counted(client: TestClient, content: bytes, status: int) -> None:
    answer = client.post(PATH, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    assert set(answer.json()) == {"error", "error_type"}
    assert 'gyrfalcon_rejected_total{cause="malformed"} 1.0' in client.get("/metrics").text


def test_a_body_beyond_the_limit_and_another_type_are_refused(make_client: MakeClient) -> None:
    client = make_client(payload_limit=100)
    assert client.post(PATH, json={"text": "x" * 100}).status_code == 413
    assert client.post(PATH, content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415


def test_it_is_behind_the_key(make_client: MakeClient) -> None:
    client = make_client(api_keys=("k",))
    assert client.post(PATH, json={"text": "x"}).status_code == 401
    assert client.post(PATH, json={"text": "x"}, headers={"Authorization": "Bearer k"}).status_code == 200
    assert client.get("/openapi.json").json()["paths"][PATH]["post"]["security"] == [{"ApiKey": []}]


def test_other_methods_are_not_allowed(client: TestClient) -> None:
    answer = client.get(PATH)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
