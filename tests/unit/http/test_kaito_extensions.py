"""What `/chat` has beyond KAITO's service: details, streams, the conversational form by configuration."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from gyrfalcon.service.tokenizer import load_tokenizer
from gyrfalcon.testing.engine import FakeEngine

from .conftest import MakeClient

PROMPT = "the people"
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def ids(tokenizer_folder: Path) -> list[int]:
    return list(load_tokenizer(tokenizer_folder).encode(" of the town ."))


@pytest.fixture
def client(make_client: MakeClient, ids: list[int]) -> TestClient:
    return make_client(FakeEngine(script=ids))


def events(answer: Any) -> list[Any]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream"
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: ")]


class TestDetails:
    def test_they_are_absent_unless_asked_for(self, client: TestClient) -> None:
        kwargs = {"output_scores": True, "return_dict_in_generate": True}
        answer = client.post("/chat", json={"prompt": PROMPT, "generate_kwargs": kwargs, "details": False})
        assert list(answer.json()) == ["Result"]

    def test_each_sequence_has_an_entry(self, client: TestClient, ids: list[int], tokenizer_folder: Path) -> None:
        kwargs = {"num_return_sequences": 2, "seed": 2**64 - 1}
        body = {"prompt": PROMPT, "generate_kwargs": kwargs, "details": True}
        details = client.post("/chat", json=body).json()["details"]
        entry = {"generated_text": " of the town .", "generated_tokens": len(ids) + 1, "finish_reason": "eos_token"}
        assert details == {
            "prompt_tokens": len(load_tokenizer(tokenizer_folder).encode(PROMPT)),
            "sequences": [entry | {"seed": 2**64 - 1}, entry | {"seed": 0}],
        }

    @pytest.mark.parametrize("name", ["output_scores", "return_dict_in_generate"])
    def test_scores_come_with_the_ids(self, client: TestClient, ids: list[int], name: str) -> None:
        kwargs = {"do_sample": False, "max_new_tokens": 3, name: True}
        body = {"prompt": PROMPT, "generate_kwargs": kwargs, "details": True}
        (sequence,) = client.post("/chat", json=body).json()["details"]["sequences"]
        assert sequence["sequence"] == ids[:3]
        assert sequence["scores"] == [-(1 + id_ % 8) / 8 for id_ in ids[:3]]
        assert (sequence["finish_reason"], sequence["seed"]) == ("length", None)
        assert (sequence["sequences_scores"], sequence["beam_indices"]) == (None, None)

    def test_texts_are_cleaned_as_the_result_is(self, client: TestClient) -> None:
        body = {"prompt": PROMPT, "clean_up_tokenization_spaces": True, "details": True}
        answer = client.post("/chat", json=body).json()
        assert answer["Result"] == PROMPT + " of the town."
        assert answer["details"]["sequences"][0]["generated_text"] == " of the town."


class TestStream:
    def test_an_event_a_token_and_the_result_at_the_end(self, client: TestClient, ids: list[int]) -> None:
        *deltas, last = events(client.post("/chat", json={"prompt": PROMPT, "stream": True}))
        assert [list(delta) for delta in deltas] == [["Delta", "sequence"]] * (len(ids) + 1)
        assert "".join(delta["Delta"] for delta in deltas) == " of the town ."
        assert last == {"Result": PROMPT + " of the town ."}

    def test_several_sequences_are_told_apart(self, client: TestClient) -> None:
        body = {"prompt": PROMPT, "stream": True, "details": True, "generate_kwargs": {"num_return_sequences": 2}}
        *deltas, last = events(client.post("/chat", json=body))
        for number in (0, 1):
            assert "".join(delta["Delta"] for delta in deltas if delta["sequence"] == number) == " of the town ."
        assert last["Result"] == (PROMPT + " of the town .") * 2
        assert len(last["details"]["sequences"]) == 2

    def test_a_conversation_ends_with_its_message(self, client: TestClient) -> None:
        last = events(client.post("/chat", json={"messages": MESSAGES, "stream": True}))[-1]
        assert ast.literal_eval(last["Result"]) == {"role": "assistant", "content": " of the town ."}

    def test_a_search_is_refused(self, client: TestClient) -> None:
        body = {"prompt": PROMPT, "stream": True, "generate_kwargs": {"num_beams": 2}}
        (event,) = events(client.post("/chat", json=body))
        assert "`num_beams`" in event["detail"]

    def test_a_failure_is_the_last_event(self, make_client: MakeClient) -> None:
        client = make_client(FakeEngine(fail_after=2))
        *deltas, last = events(client.post("/chat", json={"prompt": PROMPT, "stream": True}))
        assert len(deltas) == 2
        assert last == {"detail": "the fake engine fails here"}

    def test_what_cannot_be_read_is_refused_before_it_begins(self, client: TestClient) -> None:
        body = {"prompt": PROMPT, "stream": True, "generate_kwargs": {"nothing": 1}}
        assert client.post("/chat", json=body).status_code == 422
        assert client.post("/chat", json={"prompt": "", "stream": True}).status_code == 400


class TestConversationalPipeline:
    def test_the_messages_are_continued_whatever_the_prompt(self, make_client: MakeClient, ids: list[int]) -> None:
        engine = FakeEngine(script=ids)
        client = make_client(engine, kaito_pipeline="conversational")
        body = {"prompt": PROMPT, "prefix": "x", "handle_long_generation": "any", "messages": MESSAGES}
        result = client.post("/chat", json=body).json()["Result"]
        assert ast.literal_eval(result) == {"role": "assistant", "content": " of the town ."}
        alone = make_client(engine).post("/chat", json={"messages": MESSAGES})
        assert alone.json()["Result"] == result
        assert engine.requests[0].prompt_ids == engine.requests[1].prompt_ids

    @pytest.mark.parametrize("body", [{"prompt": PROMPT}, {"messages": []}, {}])
    def test_without_messages_they_are_missed(self, make_client: MakeClient, body: dict[str, Any]) -> None:
        answer = make_client(kaito_pipeline="conversational").post("/chat", json=body)
        assert (answer.status_code, answer.json()) == (400, {"detail": "Conversational parameter messages required"})


def test_the_document_tells_of_the_extensions(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    assert {"details", "stream", "generate_kwargs"} <= set(schemas["ChatRequest"]["properties"])
    assert {"num_beams", "bad_words_ids", "min_p"} <= set(schemas["GenerateKwargs"]["properties"])
    answer = document["paths"]["/chat"]["post"]["responses"]["200"]["content"]
    assert answer["text/event-stream"]["schema"] == {"$ref": "#/components/schemas/ChatEvent"}
    assert answer["application/json"]["schema"] == {"$ref": "#/components/schemas/ChatResponse"}
    assert "ChatEvent" in schemas
