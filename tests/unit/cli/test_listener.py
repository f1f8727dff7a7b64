"""Taking the server's address early, and what is said when it cannot be had."""

from __future__ import annotations

import contextlib
import errno
import socket

import pytest

from gyrfalcon.cli.listener import claim
from gyrfalcon.errors import SettingsError


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_the_address_is_taken_but_refuses_connections_until_it_listens(host: str) -> None:
    port = free_port()
    with claim(host, port) as listener:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        listener.listen()
        socket.create_connection(("127.0.0.1", port), timeout=5).close()


def test_a_port_in_use_is_told_with_a_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SettingsError) as raised:
            claim("127.0.0.1", port)
    assert str(raised.value) == (
        f"--port: {port} on 127.0.0.1 is in use by another program; "
        f"stop that or choose another: --port {port + 1 if port < 65535 else port - 1}"
    )


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-name.invalid", "a" * 70 + ".invalid"])
def test_an_address_that_is_not_this_machines_names_the_host(host: str) -> None:
    with pytest.raises(SettingsError, match="^--host: `.*` is not an address of this machine"):
        claim(host, free_port())


def test_a_privileged_port_is_told_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(SettingsError, match="^--port: 80 needs privileges"):
        claim("127.0.0.1", 80)


def test_a_server_that_restarts_gets_its_port_back_at_once() -> None:
    port = free_port()
    with claim("127.0.0.1", port) as first:
        first.listen()
        client = socket.create_connection(("127.0.0.1", port), timeout=5)
        served, _ = first.accept()
        served.close()  # the server's side closes first: the connection lingers in TIME_WAIT
        client.close()
    with contextlib.closing(claim("127.0.0.1", port)) as second:
        second.listen()
