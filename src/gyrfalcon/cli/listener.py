"""The server's socket, taken before the model is loaded: a busy port is known at once, not after minutes."""

from __future__ import annotations

import errno
import socket
from typing import Any

from gyrfalcon.errors import SettingsError


def claim(host: str, port: int) -> socket.socket:
    """A socket bound to the address, not yet listening: until it does, connections are refused.

    Raises SettingsError that names the flag at fault and a remedy.
    """
    family, address = _resolve(host, port)
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        # A restart must not wait for the connections of its predecessor to be forgotten.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _explain(error, host, port) from error
    return listener


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise SettingsError("--host", f"`{host}` is not an address of this machine: {error}") from error
    # `localhost` means both families to clients; the older one is understood everywhere.
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return family, address


def _explain(error: OSError, host: str, port: int) -> SettingsError:
    if error.errno == errno.EADDRINUSE:
        other = port + 1 if port < 65535 else port - 1
        return SettingsError(
            "--port", f"{port} on {host} is in use by another program; stop that or choose another: --port {other}"
        )
    if error.errno == errno.EACCES:
        return SettingsError("--port", f"{port} needs privileges this process lacks; choose one above 1023")
    if error.errno == errno.EADDRNOTAVAIL:
        return SettingsError("--host", f"`{host}` is not an address of this machine")
    return SettingsError("--host", f"cannot listen on `{host}` port {port}: {error.strerror or error}")
