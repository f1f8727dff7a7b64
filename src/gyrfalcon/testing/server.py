"""A `gyrfalcon serve` of its own process, for tests that want the whole thing."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

START_TIMEOUT_S = 90.0


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer read to its end."""

    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The JSON values of an event stream."""
        return [json.loads(line[5:]) for line in self.body.splitlines() if line.startswith(b"data:")]


class ServerProcess:
    """A server that runs in a process of its own, and its log."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def engine(self) -> psutil.Process:
        """The process the engine runs in."""
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if "spawn_main" in " ".join(child.cmdline()))

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: dict[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> Answer:
        """Send one request and read its answer; a body that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            payload = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, payload, {"Content-Type": "application/json"} | (headers or {}))
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def generate(self, inputs: str, **parameters: Any) -> Answer:
        return self.request("POST", "/generate", {"inputs": inputs, "parameters": parameters})

    def wait_until_healthy(self, timeout_s: float = START_TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with status {self.process.returncode}:\n{self.log}")
            try:
                if self.request("GET", "/health").status == 200:
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise TimeoutError(f"the server is not healthy after {timeout_s} s:\n{self.log}")


@contextmanager
def running_server(*arguments: str, environ: dict[str, str] | None = None) -> Iterator[ServerProcess]:
    """`gyrfalcon serve` with these arguments on a free port, healthy; ended on leaving."""
    with starting_server("serve", *arguments, environ=environ) as server:
        server.wait_until_healthy()
        yield server


@contextmanager
def starting_server(command: str, *arguments: str, environ: dict[str, str] | None = None) -> Iterator[ServerProcess]:
    """The same without waiting, for starts that are meant to fail; `command` is the subcommand."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as stream:
            process = subprocess.Popen(  # noqa: S603  (our own command line)
                [sys.executable, "-m", "gyrfalcon", command, *arguments, "--port", str(port)],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | (environ or {}),
            )
            try:
                yield ServerProcess(process, port, log)
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                    try:
                        process.wait(timeout=10)
                    except subprocess.TimeoutExpired:
                        process.kill()
                        process.wait()


def free_port() -> int:
    """A port nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
