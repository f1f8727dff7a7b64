"""`gyrfalcon doctor`: facts about the machine, and what is in the way of serving."""

from __future__ import annotations

import socket

import pytest

from gyrfalcon import __version__
from gyrfalcon.cli.doctor import doctor
from gyrfalcon.config import CPU_KERNELS_VARIABLE, Settings


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_it_shows_versions_machine_cache_and_what_would_be_served(capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    doctor(Settings(model="falcon-7b", port=port))
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["gyrfalcon"].startswith(__version__)
    assert rows["torch"][0].isdigit()
    assert "GiB free" in rows["memory"]
    assert rows["cache"].endswith("offline mode is on")
    assert rows["kernels"].startswith(("amx", "avx512", "avx2", "plain PyTorch: "))
    assert rows["model"] == "the Hub checkpoint tiiuae/falcon-7b"
    assert rows["address"] == f"127.0.0.1 port {port}, free"


def test_it_tells_every_obstacle_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        pytest.raises(SystemExit) as raised,
    ):
        doctor(Settings(model="./missing", port=other.getsockname()[1]))
    errors = capsys.readouterr().err.splitlines()
    assert raised.value.code == 1
    assert len(errors) == 2
    assert errors[0] == "error: there is no folder `./missing`"
    assert errors[1].startswith("error: --port: ")


def test_it_tells_when_the_kernels_asked_for_are_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(CPU_KERNELS_VARIABLE, "sse9")
    with pytest.raises(SystemExit):
        doctor(Settings(port=free_port()))
    assert "error: GYRFALCON_CPU_KERNELS: `sse9` is none of " in capsys.readouterr().err
