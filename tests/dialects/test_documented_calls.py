"""The calls of the two documents that this server implements, as they stand there."""

from __future__ import annotations

import json

from starlette.testclient import TestClient

from gyrfalcon.testing.engine import FakeEngine

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

HEADERS = {"Content-Type": "application/json", "Authorization": "Bearer KEY"}


def test_generate(client: TestClient, engine: FakeEngine) -> None:
    answer = client.post("/generate", content=GENERATE, headers=HEADERS)
    assert answer.status_code == 200
    body = answer.json()
    assert list(body) == ["generated_text", "details"]
    details = body["details"]
    assert details["finish_reason"] == "length"
    assert details["generated_tokens"] == len(details["tokens"]) == 20
    assert isinstance(details["seed"], int)  # the temperature implies sampling
    assert "".join(token["text"] for token in details["prefill"]) == "My name is Olivier and I"
    assert body["generated_text"] == "".join(token["text"] for token in details["tokens"] if not token["special"])
    assert answer.headers["x-model-id"] == "eyas"

    (request,) = engine.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.typical_p) == (0.5, 10, 0.95, 0.95)
    assert sampling.repetition_penalty == 1.03
    assert sampling.watermark is not None


def test_generate_stream(client: TestClient) -> None:
    body = GENERATE.replace('"decoder_input_details": true', '"decoder_input_details": false')
    answer = client.post("/generate_stream", content=body, headers=HEADERS)
    assert answer.status_code == 200
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line]
    assert [event["index"] for event in events] == list(range(1, 21))
    assert all(event["generated_text"] is None for event in events[:-1])
    assert events[-1]["generated_text"] == "".join(
        event["token"]["text"] for event in events if not event["token"]["special"]
    )
    assert events[-1]["details"]["finish_reason"] == "length"


def test_chat(client: TestClient, engine: FakeEngine) -> None:
    headers = {"accept": "application/json", **HEADERS}
    answer = client.post("/chat", content=CHAT, headers=headers)
    assert answer.status_code == 200
    assert list(answer.json()) == ["Result"]
    (request,) = engine.requests
    assert len(request.prompt_ids) + request.max_new_tokens == 200
    assert request.sampling.do_sample


def test_none_of_them_without_the_key(client: TestClient) -> None:
    for path, body in (("/generate", GENERATE), ("/generate_stream", GENERATE), ("/chat", CHAT)):
        answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 401
