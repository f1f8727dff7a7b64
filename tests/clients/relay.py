"""A TCP relay in front of a server: it passes bytes on as they are and keeps what clients sent."""

from __future__ import annotations

import json
import socket
import socketserver
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Sent:
    """A request as a client sent it."""

    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    body: Any  # what its JSON says; None where there is no body


class Relay:
    """Relays every connection to a port of this machine, from entering until leaving."""

    def __init__(self, target_port: int) -> None:
        self._streams: list[bytearray] = []  # one a connection
        streams = self._streams

        class Connection(socketserver.BaseRequestHandler):
            request: socket.socket

            def handle(self) -> None:
                kept = bytearray()
                streams.append(kept)
                with socket.create_connection(("127.0.0.1", target_port)) as server:
                    back = threading.Thread(target=_pump, args=(server, self.request, None), daemon=True)
                    back.start()
                    _pump(self.request, server, kept)
                    back.join()

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Connection)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Relay:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def sent(self) -> list[Sent]:
        """The requests so far, those of one connection in their order."""
        return [request for stream in self._streams for request in _requests(bytes(stream))]


def _pump(source: socket.socket, target: socket.socket, kept: bytearray | None) -> None:
    """Pass bytes on until the source's end, and then the end."""
    with suppress(OSError):
        while chunk := source.recv(65536):
            if kept is not None:
                kept += chunk
            target.sendall(chunk)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _requests(stream: bytes) -> list[Sent]:
    requests = []
    while stream:
        head, _, rest = stream.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if "transfer-encoding" in headers:
            raise ValueError(f"{method} {path}: a body in chunks cannot be read")
        length = int(headers.get("content-length", "0"))
        requests.append(Sent(method, path, headers, json.loads(rest[:length]) if length else None))
        stream = rest[length:]
    return requests
