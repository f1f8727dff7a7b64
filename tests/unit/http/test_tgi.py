from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.testclient import TestClient

from gyrfalcon import errors
from gyrfalcon.engine.interface import EngineState
from gyrfalcon.http.app import create_app
from gyrfalcon.http.settings import HttpSettings
from gyrfalcon.http.tgi_render import render_error
from gyrfalcon.http.wire import ServerStopping
from gyrfalcon.service.tokenizer import load_tokenizer
from gyrfalcon.testing.engine import FakeEngine
from gyrfalcon.testing.text import EOS_ID, EOS_TOKEN, text_service, write_tokenizer
from gyrfalcon.tracing import Tracer

from .conftest import MakeClient

PROMPT = "the people"


def generate(client: TestClient, path: str = "/generate", **parameters: Any) -> Any:
    answer = client.post(path, json={"inputs": PROMPT, "parameters": parameters})
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(client: TestClient, path: str = "/generate_stream", **body: Any) -> list[Any]:
    answer = client.post(path, json={"inputs": PROMPT, **body})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream"
    *frames, rest = answer.text.split("\n\n")
    assert rest == ""
    assert all(frame.startswith("data: {") and "\n" not in frame for frame in frames)
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def requests_of(caplog: pytest.LogCaptureFixture) -> list[Any]:
    """What was logged of finished requests."""
    return [record for record in caplog.records if record.name == "gyrfalcon.telemetry"]


@pytest.fixture
def playing(make_client: MakeClient, tokenizer_folder: Any) -> TestClient:
    """An engine that writes ` the town` and ends."""
    script = load_tokenizer(tokenizer_folder).encode(" the town")
    return make_client(FakeEngine(script=script))


class TestGenerate:
    def test_without_details_there_is_only_the_text(self, playing: TestClient) -> None:
        assert generate(playing) == {"generated_text": " the town"}

    def test_without_parameters_it_is_greedy_and_of_the_documented_length(self, make_client: MakeClient) -> None:
        engine = FakeEngine()
        client = make_client(engine)
        assert client.post("/generate", json={"inputs": PROMPT}).status_code == 200
        assert not engine.requests[0].sampling.do_sample
        assert engine.requests[0].max_new_tokens == 20

    def test_details_have_exactly_their_keys(self, playing: TestClient) -> None:
        answer = generate(playing, details=True)
        assert list(answer) == ["generated_text", "details"]
        details = answer["details"]
        assert list(details) == ["finish_reason", "generated_tokens", "seed", "prefill", "tokens"]
        assert details["finish_reason"] == "eos_token"
        assert details["generated_tokens"] == len(details["tokens"])
        assert (details["seed"], details["prefill"]) == (None, [])
        assert all(list(token) == ["id", "text", "logprob", "special"] for token in details["tokens"])
        assert details["tokens"][-1] | {"logprob": 0} == {
            "id": EOS_ID,
            "text": EOS_TOKEN,
            "logprob": 0,
            "special": True,
        }

    def test_the_prompts_tokens_imply_details(self, playing: TestClient, tokenizer_folder: Any) -> None:
        prefill = generate(playing, decoder_input_details=True)["details"]["prefill"]
        assert [token["id"] for token in prefill] == load_tokenizer(tokenizer_folder).encode(PROMPT)
        assert all(list(token) == ["id", "text", "logprob"] for token in prefill)
        assert prefill[0]["logprob"] is None
        assert "".join(token["text"] for token in prefill) == PROMPT

    def test_the_other_sequences_are_listed_only_with_best_of(self, client: TestClient) -> None:
        answer = generate(client, best_of=3, do_sample=True, details=True, max_new_tokens=4)
        details = answer["details"]
        others = details["best_of_sequences"]
        assert len(others) == 2
        assert all(
            list(other) == ["generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens"]
            for other in others
        )

        def mean(sequence: Any) -> float:
            return sum(token["logprob"] for token in sequence["tokens"]) / sequence["generated_tokens"]

        assert mean(details) >= max(map(mean, others))
        assert len({details["seed"], *(other["seed"] for other in others)}) == 3

    def test_best_of_without_details_returns_the_best_text_alone(self, client: TestClient) -> None:
        assert list(generate(client, best_of=2, do_sample=True)) == ["generated_text"]

    def test_likeliest_tokens_are_listed_only_when_asked_for(self, client: TestClient) -> None:
        details = generate(client, top_n_tokens=2, details=True, max_new_tokens=3)["details"]
        assert [len(top) for top in details["top_tokens"]] == [2, 2, 2]
        assert list(details["top_tokens"][0][0]) == ["id", "text", "logprob", "special"]
        assert "top_tokens" not in generate(client, top_n_tokens=0, details=True)["details"]

    def test_sampling_tells_its_seed(self, client: TestClient) -> None:
        assert generate(client, seed=2**64 - 1, do_sample=True, details=True)["details"]["seed"] == 2**64 - 1
        assert generate(client, seed=3, details=True)["details"]["seed"] is None

    @pytest.mark.parametrize(
        ("asked", "text"), [(True, PROMPT + " the town"), (False, " the town"), (None, " the town")]
    )
    def test_the_prompt_is_returned_when_asked_for(self, playing: TestClient, asked: object, text: str) -> None:
        assert generate(playing, return_full_text=asked)["generated_text"] == text

    def test_a_truncated_prompt_is_still_returned_whole(self, playing: TestClient) -> None:
        assert generate(playing, return_full_text=True, truncate=1)["generated_text"] == PROMPT + " the town"

    def test_the_stop_string_is_kept(self, playing: TestClient) -> None:
        answer = generate(playing, stop=["e t"], details=True)
        assert answer["generated_text"] == " the t"
        assert answer["details"]["finish_reason"] == "stop_sequence"

    def test_single_precision_is_written_short(self, make_client: MakeClient) -> None:
        text = make_client().post("/generate", json={"inputs": PROMPT, "parameters": {"details": True}}).text
        assert all(len(number.split(",")[0]) <= 7 for number in text.split('"logprob":')[1:])

    def test_headers_tell_what_it_cost(self, playing: TestClient, tokenizer_folder: Any) -> None:
        answer = playing.post("/generate", json={"inputs": PROMPT, "model": "whatever"})
        headers = answer.headers
        assert headers["x-compute-type"] == "cpu"
        assert headers["x-compute-characters"] == str(len(PROMPT))
        assert headers["x-prompt-tokens"] == str(len(load_tokenizer(tokenizer_folder).encode(PROMPT)))
        assert headers["x-generated-tokens"] == str(len(load_tokenizer(tokenizer_folder).encode(" the town")) + 1)
        assert headers["x-model-id"] == "tiny"
        assert float(headers["x-compute-time"]) > 0
        times = ["x-total-time", "x-validation-time", "x-queue-time", "x-inference-time", "x-time-per-token"]
        assert all(headers[name].isdecimal() for name in times)

    def test_the_log_and_the_answer_name_the_request_alike(
        self, client: TestClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO", "gyrfalcon.telemetry")
        answers = [client.post(path, json={"inputs": "x"}) for path in ("/generate", "/generate_stream", "/")]
        logged = [record.request_id for record in requests_of(caplog)]
        assert logged == [answer.headers["x-request-id"] for answer in answers]
        assert len(set(logged)) == 3

    def test_the_compute_type_may_be_set(self, make_client: MakeClient) -> None:
        client = make_client(compute_type="1-nvidia-h200")
        assert client.post("/generate", json={"inputs": "x"}).headers["x-compute-type"] == "1-nvidia-h200"

    def test_unknown_members_are_ignored_at_every_level(self, client: TestClient) -> None:
        body = {"inputs": "x", "unknown": 1, "parameters": {"stop_sequences": ["x"], "nothing": {}}, "stream": 3}
        assert client.post("/generate", json=body).status_code == 200

    @pytest.mark.parametrize(("name", "value"), [("grammar", {"type": "json", "value": {}}), ("adapter_id", "x")])
    @pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
    def test_what_is_known_but_not_honoured_is_refused_by_name(
        self, client: TestClient, path: str, name: str, value: object
    ) -> None:
        answer = client.post(path, json={"inputs": "x", "parameters": {name: value}})
        is_stream = path == "/generate_stream"
        assert answer.status_code == (200 if is_stream else 422)
        refusal = json.loads(answer.text.removeprefix("data: "))
        assert refusal["error_type"] == "validation"
        assert f"`{name}`" in refusal["error"]
        assert 'tgi_request_failure{err="validation"} 1.0' in client.get("/metrics").text.splitlines()
        assert client.post(path, json={"inputs": "x", "parameters": {name: None}}).status_code == 200

    def test_every_parameter_reaches_the_engine(self, make_client: MakeClient, tokenizer_folder: Any) -> None:
        engine = FakeEngine()
        generate(
            make_client(engine),
            best_of=None,
            decoder_input_details=True,
            frequency_penalty=0.25,
            max_new_tokens=7,
            min_new_tokens=3,
            repetition_penalty=1.5,
            seed=9,
            temperature=0.5,
            top_k=11,
            top_n_tokens=2,
            top_p=0.75,
            truncate=1,
            typical_p=0.625,
            watermark=True,
        )
        (request,) = engine.requests
        sampling = request.sampling
        assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.typical_p) == (0.5, 11, 0.75, 0.625)
        assert (sampling.repetition_penalty, sampling.frequency_penalty, sampling.seed) == (1.5, 0.25, 9)
        assert sampling.do_sample
        assert sampling.watermark is not None
        assert request.prompt_ids == tuple(load_tokenizer(tokenizer_folder).encode(PROMPT)[-1:])
        assert (request.max_new_tokens, request.min_new_tokens) == (7, 3)
        assert (request.top_n, request.prompt_logprobs) == (2, True)


class TestStream:
    def test_events_have_exactly_their_keys(self, playing: TestClient) -> None:
        *tokens, last = events(playing)
        for index, event in enumerate([*tokens, last], start=1):
            assert list(event) == ["index", "token", "generated_text", "details"]
            assert list(event["token"]) == ["id", "text", "logprob", "special"]
            assert event["index"] == index
        assert all(event["generated_text"] is None and event["details"] is None for event in tokens)
        assert (last["generated_text"], last["details"]) == (" the town", None)
        assert (last["token"]["text"], last["token"]["special"]) == (EOS_TOKEN, True)

    def test_details_are_short_and_last(self, playing: TestClient, tokenizer_folder: Any) -> None:
        *tokens, last = events(playing, parameters={"details": True})
        assert all(event["details"] is None for event in tokens)
        assert last["details"] == {
            "finish_reason": "eos_token",
            "generated_tokens": len(tokens) + 1,
            "seed": None,
            "input_length": len(load_tokenizer(tokenizer_folder).encode(PROMPT)),
        }

    def test_likeliest_tokens_come_with_each_event_when_asked_for(self, playing: TestClient) -> None:
        assert all(len(event["top_tokens"]) == 3 for event in events(playing, parameters={"top_n_tokens": 3}))

    def test_the_prompt_shows_only_in_the_final_text(self, playing: TestClient) -> None:
        *tokens, last = events(playing, parameters={"return_full_text": True})
        assert last["generated_text"] == PROMPT + " the town"
        assert not tokens[0]["token"]["text"].startswith("the people")

    @pytest.mark.parametrize("char", ["\x85", "\u2028", "\u2029", "\n", "\r", "\x0b", "\x1c"])
    def test_no_character_breaks_an_event_into_lines(self, client: TestClient, char: str) -> None:
        body = {"inputs": f"a{char}b", "parameters": {"return_full_text": True, "max_new_tokens": 1}}
        answer = client.post("/generate_stream", json=body)
        (line,) = [line for line in answer.text.splitlines() if line]
        assert json.loads(line.removeprefix("data: "))["generated_text"].startswith(body["inputs"])

    def test_there_is_no_end_mark(self, playing: TestClient) -> None:
        answer = playing.post("/generate_stream", json={"inputs": PROMPT})
        assert "[DONE]" not in answer.text

    def test_headers(self, playing: TestClient) -> None:
        headers = playing.post("/generate_stream", json={"inputs": PROMPT}).headers
        assert headers["cache-control"] == "no-cache"
        assert headers["x-accel-buffering"] == "no"
        assert headers["x-compute-characters"] == str(len(PROMPT))
        assert "x-total-time" not in headers

    @pytest.mark.parametrize(
        ("parameters", "named"),
        [
            ({"best_of": 2, "do_sample": True}, "`best_of`"),
            ({"best_of": 0}, "`best_of`"),
            ({"decoder_input_details": True}, "`decoder_input_details`"),
            ({"temperature": 0}, "`temperature` must be strictly positive"),
            ({"max_new_tokens": 9999}, "`inputs` tokens + `max_new_tokens` must be <= 256"),
        ],
    )
    def test_a_broken_rule_is_one_event(self, client: TestClient, parameters: dict[str, Any], named: str) -> None:
        (event,) = events(client, parameters=parameters)
        assert event["error_type"] == "validation"
        assert event["error"].startswith("Input validation error: ")
        assert named in event["error"]

    def test_a_request_that_can_never_be_admitted_is_one_event(self, make_client: MakeClient) -> None:
        (event,) = events(make_client(max_concurrent_requests=1), parameters={"best_of": 2, "do_sample": True})
        assert event["error_type"] == "validation"

    def test_a_failure_is_the_last_event(self, make_client: MakeClient) -> None:
        *tokens, last = events(make_client(FakeEngine(fail_after=2)))
        assert [event["index"] for event in tokens] == [1, 2]
        assert last["error_type"] == "generation"


class TestCompat:
    def test_the_answer_is_a_list_of_one_with_the_prompt(self, playing: TestClient) -> None:
        (answer,) = playing.post("/", json={"inputs": PROMPT}).json()
        assert answer == {"generated_text": PROMPT + " the town"}

    @pytest.mark.parametrize(("asked", "prompt"), [(None, PROMPT), (True, PROMPT), (False, "")])
    def test_the_prompt_is_returned_unless_declined(self, playing: TestClient, asked: object, prompt: str) -> None:
        (answer,) = generate(playing, "/", return_full_text=asked)
        assert answer["generated_text"] == prompt + " the town"
        last = events(playing, "/", stream=True, parameters={"return_full_text": asked})[-1]
        assert last["generated_text"] == prompt + " the town"

    def test_it_streams_when_asked_to(self, playing: TestClient) -> None:
        parameters = {"return_full_text": False, "details": True}
        assert events(playing, "/", stream=True, parameters=parameters) == events(playing, parameters=parameters)

    @pytest.mark.parametrize("stream", [None, 1, "true"])
    def test_whether_to_stream_is_a_boolean(self, client: TestClient, stream: object) -> None:
        assert client.post("/", json={"inputs": "x", "stream": stream}).status_code == 422


class TestTokenize:
    def test_tokens_have_the_bytes_they_came_from(self, client: TestClient, tokenizer_folder: Any) -> None:
        text = "the déjà vu 🦅"
        tokens = client.post("/tokenize", json={"inputs": text}).json()
        assert [token["id"] for token in tokens] == load_tokenizer(tokenizer_folder).encode(text)
        assert all(list(token) == ["id", "text", "start", "stop"] for token in tokens)
        for token in tokens:
            assert text.encode()[token["start"] : token["stop"]].decode() == token["text"]
        assert (tokens[0]["start"], tokens[-1]["stop"]) == (0, len(text.encode()))

    def test_parameters_are_read_and_have_no_effect(self, client: TestClient) -> None:
        plain = client.post("/tokenize", json={"inputs": PROMPT}).json()
        parameters = {"truncate": 1, "temperature": 0, "grammar": {"type": "json", "value": {}}}
        assert client.post("/tokenize", json={"inputs": PROMPT, "parameters": parameters}).json() == plain
        answer = client.post("/tokenize", json={"inputs": PROMPT, "parameters": {"truncate": "1"}})
        assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")

    @pytest.mark.parametrize(("text", "num_tokens"), [("", 0), (" the" * 5000, 5000)])
    def test_no_length_is_refused(self, client: TestClient, text: str, num_tokens: int) -> None:
        assert len(client.post("/tokenize", json={"inputs": text}).json()) == num_tokens

    def test_a_conversation_is_shown_as_the_template_writes_it(self, client: TestClient, tokenizer_folder: Any) -> None:
        messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who?", "name": "x"}]
        answer = client.post("/chat_tokenize", json={"messages": messages, "temperature": 3}).json()
        assert list(answer) == ["tokenize_response", "templated_text"]
        assert answer["templated_text"] == "System: Be short.\nUser: Who?\nAssistant:"
        ids = load_tokenizer(tokenizer_folder).encode(answer["templated_text"], add_special_tokens=False)
        assert [token["id"] for token in answer["tokenize_response"]] == ids
        assert "tgi_request_count 1.0" in client.get("/metrics").text.splitlines()

    def test_a_messages_pieces_are_joined(self, client: TestClient) -> None:
        content = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "o?"}]
        answer = client.post("/chat_tokenize", json={"messages": [{"role": "user", "content": content}], "tools": []})
        assert answer.json()["templated_text"] == "User: Who?\nAssistant:"

    @pytest.mark.parametrize(
        ("body", "kind", "named"),
        [
            ({"messages": []}, "validation", "`messages` must not be empty"),
            ({}, "validation", "messages: Field required"),
            ({"messages": [{"role": "user"}]}, "validation", "messages.0.content"),
            ({"messages": [{"role": "user", "content": None}]}, "validation", "messages.0.content"),
            ({"messages": [{"content": "x"}]}, "validation", "messages.0.role"),
            ({"messages": [{"role": "u", "content": [{"type": "image_url"}]}]}, "validation", "messages.0.content"),
            ({"messages": [{"role": "u", "content": "x"}], "tools": [{}]}, "validation", "`tools` is not supported"),
            ({"messages": [{"role": "u", "content": "x"}], "tools": "x"}, "validation", "tools"),
        ],
    )
    def test_a_bad_conversation_is_refused_by_name(self, client: TestClient, body: Any, kind: str, named: str) -> None:
        answer = client.post("/chat_tokenize", json=body)
        assert (answer.status_code, answer.json()["error_type"]) == (422, kind)
        assert named in answer.json()["error"]

    def test_a_model_without_a_template_says_so(self, tmp_path: Path) -> None:
        service, metrics = text_service(FakeEngine(), write_tokenizer(tmp_path, chat_template=None))
        client = TestClient(create_app(service, HttpSettings(), metrics))
        answer = client.post("/chat_tokenize", json={"messages": [{"role": "user", "content": "x"}]})
        assert (answer.status_code, answer.json()["error_type"]) == (422, "template_error")
        assert 'tgi_request_failure{err="template"} 1.0' in client.get("/metrics").text.splitlines()


class TestErrors:
    @pytest.mark.parametrize(
        ("parameters", "text"),
        [
            ({"best_of": 9, "do_sample": True}, "Input validation error: `best_of` must be > 0 and <= 4. Given: 9"),
            ({"temperature": 0.0}, "Input validation error: `temperature` must be strictly positive. Given: 0.0"),
            ({"max_new_tokens": 0}, "Input validation error: `max_new_tokens` must be strictly positive. Given: 0"),
            ({"top_n_tokens": 21}, "Input validation error: `top_n_tokens` must be >= 0 and <= 20. Given: 21"),
            ({"seed": 1, "best_of": 2, "do_sample": True}, "`seed` must not be set when `best_of` > 1"),
            (
                {"min_new_tokens": 21},
                "Input validation error: `min_new_tokens` must not exceed the number of new tokens, 20. Given: 21",
            ),
            ({"truncate": 0}, "Input validation error: `truncate` must be strictly positive"),
            (
                {"max_new_tokens": 255},
                "`inputs` tokens + `max_new_tokens` must be <= 256. Given: 2 `inputs` tokens and 255 `max_new_tokens`",
            ),
        ],
    )
    def test_texts_that_clients_search_for(self, client: TestClient, parameters: dict[str, Any], text: str) -> None:
        answer = client.post("/generate", json={"inputs": " the the", "parameters": parameters})
        assert answer.status_code == 422
        assert answer.json()["error_type"] == "validation"
        assert text in answer.json()["error"]
        assert not any(name.startswith("x-compute") for name in answer.headers)

    def test_an_empty_prompt_is_named_as_the_client_spells_it(self, client: TestClient) -> None:
        answer = client.post("/generate", json={"inputs": ""})
        assert (answer.status_code, answer.json()) == (
            422,
            {"error": "Input validation error: `inputs` must not be empty", "error_type": "validation"},
        )

    def test_too_long_a_prompt(self, client: TestClient) -> None:
        for inputs, said in ((" the" * 256, "256 `inputs` tokens"), ("x" * 5000, "5000 `inputs` characters")):
            answer = client.post("/generate", json={"inputs": inputs})
            assert answer.status_code == 422
            # The beginning is what clients look for.
            wanted = f"`inputs` tokens + `max_new_tokens` must be <= 256. Given: {said} and 1 `max_new_tokens`"
            assert wanted in answer.json()["error"]

    @pytest.mark.parametrize(
        ("error", "status", "kind"),
        [
            (errors.TemplateError("none"), 422, "template_error"),
            (errors.NotSupported("grammar", "`grammar` is not"), 422, "validation"),
            (errors.UnknownModel("x", ("y",)), 404, "model_not_found"),
            (errors.Overloaded("model is overloaded"), 429, "overloaded"),
            (errors.GenerationFailed("no"), 424, "generation"),
            (errors.EngineDead("gone"), 503, "generation"),
            (ServerStopping(), 503, "incomplete_generation"),
            (RuntimeError("secret path /srv"), 500, "internal"),
        ],
    )
    def test_each_error_has_its_status_and_type(self, error: Exception, status: int, kind: str) -> None:
        found, body, _headers = render_error(error)
        assert (found, body["error_type"]) == (status, kind)
        assert "secret" not in body["error"]

    def test_a_failed_generation(self, make_client: MakeClient) -> None:
        answer = make_client(FakeEngine(fail_after=1)).post("/generate", json={"inputs": "x"})
        assert (answer.status_code, answer.json()["error_type"]) == (424, "generation")
        assert answer.json()["error"].startswith("Request failed during generation: ")

    def test_a_dead_engine(self, make_client: MakeClient) -> None:
        engine = FakeEngine()
        engine.die()
        answer = make_client(engine).post("/generate", json={"inputs": "x"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


class TestHealthAndInfo:
    @pytest.mark.parametrize("path", ["/", "/health", "/ping"])
    def test_health_is_empty_or_unhealthy(self, make_client: MakeClient, path: str) -> None:
        engine = FakeEngine()
        client = make_client(engine)
        assert (client.get(path).status_code, client.get(path).content) == (200, b"")
        assert client.head(path).status_code == 200
        for state in (EngineState.DEAD, EngineState.STUCK, EngineState.STARTING):
            engine.state = state
            assert client.get(path).status_code == 503
            assert client.get(path).json() == {"error": "unhealthy", "error_type": "healthcheck"}

    def test_info_has_all_its_keys(self, client: TestClient) -> None:
        info = client.get("/info").json()
        assert set(info) >= {
            *("model_id", "model_sha", "model_pipeline_tag", "max_concurrent_requests", "max_best_of"),
            *("max_stop_sequences", "max_input_tokens", "max_total_tokens", "validation_workers"),
            *("max_client_batch_size", "router", "version", "sha", "docker_label", "max_input_length"),
        }
        assert (info["model_id"], info["max_total_tokens"], info["max_input_tokens"]) == ("tiny", 256, 255)


class TestTraces:
    TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"

    @pytest.mark.parametrize(
        ("path", "body"),
        [
            ("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 3}}),
            ("/generate_stream", {"inputs": "x", "parameters": {"max_new_tokens": 3}}),
            ("/", {"inputs": "x", "parameters": {"max_new_tokens": 3}}),
            ("/chat", {"prompt": "x", "generate_kwargs": {"max_new_tokens": 3}}),
        ],
    )
    def test_a_request_is_traced_below_its_caller_and_logged_with_the_trace(
        self, tokenizer_folder: Path, path: str, body: dict[str, Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO", "gyrfalcon.telemetry")
        exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        service, metrics = text_service(FakeEngine(), tokenizer_folder, tracer=Tracer(provider))
        client = TestClient(create_app(service, HttpSettings(), metrics))
        answer = client.post(path, json=body, headers={"traceparent": f"00-{self.TRACE_ID}-00f067aa0ba902b7-01"})
        assert answer.status_code == 200
        spans = {span.name: span for span in exporter.get_finished_spans()}
        assert set(spans) == {"text_completion tiny", "validation", "queue", "prefill", "decode"}
        assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {self.TRACE_ID}
        attributes = spans["text_completion tiny"].attributes or {}
        assert attributes["gen_ai.usage.output_tokens"] == 3
        (logged,) = requests_of(caplog)
        assert logged.trace_id == self.TRACE_ID
        assert logged.request_id == attributes["gen_ai.response.id"]

    def test_without_tracing_the_callers_trace_is_logged(
        self, client: TestClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO", "gyrfalcon.telemetry")
        headers = {"traceparent": f"00-{self.TRACE_ID}-00f067aa0ba902b7-01"}
        client.post("/generate", json={"inputs": "x"}, headers=headers)
        client.post("/generate", json={"inputs": "x"})
        first, second = requests_of(caplog)
        assert first.trace_id == self.TRACE_ID
        assert not hasattr(second, "trace_id")
