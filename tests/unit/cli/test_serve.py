"""`gyrfalcon serve`: the address is taken first, then launch serves on it, then the banner is shown."""

from __future__ import annotations

import socket
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from gyrfalcon import launch
from gyrfalcon.cli.serve import serve
from gyrfalcon.config import Settings
from gyrfalcon.engine.process import EngineChild
from gyrfalcon.errors import SettingsError
from gyrfalcon.service.interface import ModelInfo

MODEL = ModelInfo(
    name="eyas",
    revision=None,
    dtype="float32",
    device="cpu",
    num_parameters=7_654_321,
    num_text_tokens=4096,
    max_context=1024,
    max_input_tokens=1023,
    max_total_tokens=1024,
    cache_tokens=65536,
    max_concurrent_requests=128,
    max_best_of=4,
    max_stop_sequences=8,
    max_top_n_tokens=20,
    default_max_new_tokens=20,
    has_chat_template=True,
)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Settings, str, int]]:
    """The addresses that launch was told to serve on; it reports progress and readiness as the real one does."""
    calls: list[tuple[Settings, str, int]] = []

    def launch_serve(
        settings: Settings,
        *,
        listener: socket.socket,
        child: EngineChild | None,
        on_progress: Callable[[int, int], None],
        on_ready: Callable[[ModelInfo], None],
    ) -> None:
        calls.append((settings, *listener.getsockname()[:2]))
        on_progress(10, 10)
        on_ready(MODEL)

    monkeypatch.setattr(launch, "serving", SimpleNamespace(serve=launch_serve), raising=False)
    return calls


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_it_serves_on_the_settings_address_and_shows_the_banner(
    served: list[tuple[Settings, str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(port=free_port())
    serve(settings)
    assert served == [(settings, "127.0.0.1", settings.port)]
    assert f"http://127.0.0.1:{settings.port}/docs" in capsys.readouterr().out


def test_the_process_that_waits_for_an_engine_ends_with_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[EngineChild] = []

    def launch_serve(settings: Settings, *, child: EngineChild, **_: object) -> None:
        assert child.process.is_alive()
        children.append(child)

    monkeypatch.setattr(launch, "serving", SimpleNamespace(serve=launch_serve), raising=False)
    serve(Settings(port=free_port()))
    (child,) = children
    assert not child.process.is_alive()


def test_with_json_output_there_is_no_banner(
    served: list[tuple[Settings, str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    serve(Settings(port=free_port(), json_output=True))
    assert len(served) == 1
    assert capsys.readouterr().out == ""


def test_a_busy_port_is_told_before_anything_is_loaded(served: list[tuple[Settings, str, int]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(SettingsError, match="^--port: .* in use"):
        serve(Settings(port=other.getsockname()[1]))
    assert served == []


def test_the_address_is_free_again_afterwards(served: list[tuple[Settings, str, int]]) -> None:
    settings = Settings(port=free_port())
    serve(settings)
    serve(settings)
    assert len(served) == 2
