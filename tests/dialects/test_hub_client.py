"""The hub's own client against the server: it calls `POST /`, as scripts written for text-generation-inference do."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from huggingface_hub import InferenceClient, constants
from huggingface_hub.errors import ValidationError

from gyrfalcon.http.app import create_app
from gyrfalcon.http.settings import HttpSettings
from gyrfalcon.service.tokenizer import load_tokenizer
from gyrfalcon.testing.engine import FakeEngine
from gyrfalcon.testing.text import text_service

TEXT = " the town"


@pytest.fixture
def hub_client(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InferenceClient]:
    """A client of a server whose engine writes ` the town` and ends."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the loopback is no network
    engine = FakeEngine(script=load_tokenizer(tokenizer_folder).encode(TEXT))
    service, metrics = text_service(engine, tokenizer_folder, max_concurrent_requests=2)
    app = create_app(service, HttpSettings(api_keys=("KEY",)), metrics)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            yield InferenceClient(f"http://127.0.0.1:{listener.getsockname()[1]}", token="KEY", timeout=10)
        finally:
            server.should_exit = True
            thread.join()


def test_text_generation_gives_the_prompt_and_its_continuation(hub_client: InferenceClient) -> None:
    assert hub_client.text_generation("the people") == "the people" + TEXT
    assert hub_client.text_generation("the people", return_full_text=False) == TEXT


def test_details_are_read(hub_client: InferenceClient) -> None:
    output = hub_client.text_generation("the people", details=True, decoder_input_details=True, top_n_tokens=2)
    assert output.details is not None
    assert output.details.finish_reason == "eos_token"
    assert output.details.generated_tokens == len(output.details.tokens)
    assert output.details.prefill[0].logprob is None
    assert output.details.top_tokens is not None
    assert len(output.details.top_tokens[0]) == 2


def test_best_of_is_read(hub_client: InferenceClient) -> None:
    output = hub_client.text_generation("the people", details=True, best_of=2, do_sample=True)
    assert output.details is not None
    assert output.details.best_of_sequences is not None
    assert len(output.details.best_of_sequences) == 1


def test_streams_are_read(hub_client: InferenceClient) -> None:
    events = list(hub_client.text_generation("the people", stream=True, details=True))
    assert "".join(event.token.text for event in events if not event.token.special) == TEXT
    assert events[-1].generated_text == "the people" + TEXT
    assert events[-1].details is not None
    assert events[-1].details.input_length > 0


def test_errors_are_understood(hub_client: InferenceClient) -> None:
    with pytest.raises(ValidationError, match="`temperature` must be strictly positive"):
        hub_client.text_generation("the people", temperature=0.0)
    with pytest.raises(ValidationError, match="`best_of` must be > 0 and <= 2"):
        hub_client.text_generation("the people", best_of=3, do_sample=True)
    with pytest.raises(ValidationError, match="best_of"):
        list(hub_client.text_generation("the people", stream=True, best_of=2, do_sample=True))
