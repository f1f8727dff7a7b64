"""A collector of traces that keeps what it is sent: for tests of what a server exports."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Handler(http.server.BaseHTTPRequestHandler):
    """Takes OTLP over HTTP; `received` holds (path, request) pairs and belongs to a subclass made for one server."""

    received: list[tuple[str, Any]]

    def do_POST(self) -> None:
        # Only here: the package belongs to an extra.
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.received.append((self.path, ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing: the test says what it saw."""


@contextmanager
def collecting() -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """A collector's URL and the list of what it has received: (path, ExportTraceServiceRequest) pairs."""
    handler = type("Handler", (_Handler,), {"received": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", handler.received  # type: ignore[attr-defined]
        finally:
            server.shutdown()
            thread.join()
