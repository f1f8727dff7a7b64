"""`gyrfalcon generate`: the call that is made of the options, and the text as it comes."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from gyrfalcon import launch
from gyrfalcon.cli.main import app
from gyrfalcon.config import Settings
from gyrfalcon.errors import InvalidRequest
from gyrfalcon.service.interface import ChatMessage, ChatPrompt, Delta, GenerateCall, GeneratedToken


class ScriptedService:
    """Streams a fixed answer and remembers what it was asked."""

    def __init__(self, batches: list[list[tuple[str, bool]]], error: Exception | None = None) -> None:
        self.batches, self.error = batches, error
        self.calls: list[GenerateCall] = []
        self.settings: Settings | None = None
        self.was_closed = False

    async def stream(self, call: GenerateCall) -> AsyncIterator[list[Delta]]:
        self.calls.append(call)
        if self.error is not None:
            raise self.error
        for batch in self.batches:
            yield [Delta(0, 1, GeneratedToken(7, text, -0.5, special)) for text, special in batch]

    @asynccontextmanager
    async def open(
        self, settings: Settings, *, on_progress: Callable[[int, int], None]
    ) -> AsyncIterator[ScriptedService]:
        self.settings = settings
        on_progress(1, 1)
        try:
            yield self
        finally:
            self.was_closed = True


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> ScriptedService:
    scripted = ScriptedService([[("Hel", False), ("lo", False)], [(", wörld", False), ("<|end|>", True)]])
    monkeypatch.setattr(launch, "serving", SimpleNamespace(open_text_service=scripted.open), raising=False)
    return scripted


def test_the_answer_is_printed_without_special_tokens(service: ScriptedService) -> None:
    done = CliRunner().invoke(app, ["generate", "Say hello"])
    assert (done.exit_code, done.stdout) == (0, "Hello, wörld\n")
    assert service.was_closed


def test_without_options_the_call_leaves_everything_to_the_defaults(service: ScriptedService) -> None:
    CliRunner().invoke(app, ["generate", "Say hello"])
    assert service.calls == [GenerateCall(prompt="Say hello")]


def test_every_option_reaches_the_call(service: ScriptedService) -> None:
    arguments = (
        "generate x --max-new-tokens 5 --temperature 0.7 --top-k 3 --top-p 0.9 --typical-p 0.8 "
        "--repetition-penalty 1.1 --seed 42 --stop END --stop ; --watermark"
    )
    CliRunner().invoke(app, arguments.split())
    assert service.calls == [
        GenerateCall(
            prompt="x", max_new_tokens=5, temperature=0.7, top_k=3, top_p=0.9, typical_p=0.8,
            repetition_penalty=1.1, seed=42, stop=("END", ";"), watermark=True,
        )
    ]  # fmt: skip


def test_chat_sends_a_users_message(service: ScriptedService) -> None:
    CliRunner().invoke(app, ["generate", "--chat", "Hi"])
    assert service.calls[0].prompt == ChatPrompt((ChatMessage("user", "Hi"),))


def test_a_dash_reads_the_prompt_from_standard_input(service: ScriptedService) -> None:
    CliRunner().invoke(app, ["generate", "-"], input="two\nlines")
    assert service.calls[0].prompt == "two\nlines"


def test_the_model_runs_in_this_process_and_logs_only_warnings(service: ScriptedService) -> None:
    CliRunner().invoke(app, ["generate", "x", "--model", "falcon-7b", "--dtype", "float32"])
    assert service.settings is not None
    assert (service.settings.model, service.settings.dtype) == ("falcon-7b", "float32")
    assert (service.settings.engine, service.settings.log_level) == ("local", "warning")


def test_a_refused_request_is_an_error_and_the_service_is_closed(service: ScriptedService) -> None:
    service.error = InvalidRequest("temperature", "`temperature` must be positive")
    done = CliRunner().invoke(app, ["generate", "x", "--temperature", "-1"])
    assert done.exception is service.error
    assert service.was_closed


def test_each_batch_is_shown_as_it_comes(service: ScriptedService, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Terminal(io.StringIO):
        def flush(self) -> None:
            seen.append(self.getvalue())

    from gyrfalcon.cli import generate as module

    monkeypatch.setattr(module.sys, "stdout", Terminal())
    module.generate(Settings(), "x")
    assert seen[:2] == ["Hello", "Hello, wörld"]
