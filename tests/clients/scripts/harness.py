"""What the clients' scripts share. Only the standard library: it runs in every client's environment.

A script is a list of cases, each a function that calls the server in one way. `run` prints one JSON object: for each
case what the call returned, or the class and the message of what it raised.
"""

from __future__ import annotations

import asyncio
import http.client
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from enum import Enum
from typing import Any
from urllib.parse import urlsplit

PROMPT = "Return the number of"
# Far more tokens than the server's limit for a sequence.
LONG_PROMPT = "number " * 2000
# Every parameter that all clients can send, none at its default. Seeded, so that a second request tells the same.
SAMPLING = {
    "do_sample": True,
    "max_new_tokens": 12,
    "repetition_penalty": 1.1,
    "seed": 7,
    "temperature": 0.9,
    "top_k": 40,
    "top_p": 0.9,
    "truncate": 4,
    "typical_p": 0.9,
    "watermark": True,
}


@dataclass(frozen=True, slots=True)
class Call:
    """One call's server, key and headers; the headers tell the relay which case a request belongs to."""

    case: str
    url: str
    key: str

    @property
    def marker(self) -> dict[str, str]:
        return {"X-Case": self.case}

    @property
    def headers(self) -> dict[str, str]:
        return self.marker | {"Authorization": f"Bearer {self.key}"}


class Cases:
    """The cases of a script, called in order with the URL and the key of the command line."""

    def __init__(self) -> None:
        self._cases: dict[str, Callable[[Call], Any]] = {}

    def case(self, function: Callable[[Call], Any]) -> Callable[[Call], Any]:
        """A case, named as the function is."""
        self._cases[function.__name__] = function
        return function

    def run(self) -> None:
        url, key = sys.argv[1:]
        seen = {name: _outcome(function, Call(name, url, key)) for name, function in self._cases.items()}
        sys.stdout.write(json.dumps(seen, default=_plain))


@contextmanager
def occupied(call: Call, num_requests: int) -> Iterator[None]:
    """The server while this many other requests are in work; they are gone, and it knows, when this ends."""
    connections = [_open_stream(call) for _ in range(num_requests)]
    try:
        yield
    finally:
        for connection in connections:
            connection.close()
        until_idle(call)


def until_idle(call: Call, timeout_s: float = 20.0) -> float:
    """Wait until the server runs no sequence; the time it took in seconds."""
    start = time.monotonic()
    while _running_sequences(call) > 0:
        if time.monotonic() - start > timeout_s:
            raise TimeoutError(f"the server still runs sequences after {timeout_s} s")
        time.sleep(0.02)
    return time.monotonic() - start


def _open_stream(call: Call) -> http.client.HTTPConnection:
    """A long stream whose first event has arrived."""
    connection = _connection(call)
    parameters = {"max_new_tokens": 700, "do_sample": True, "seed": 5}
    body = json.dumps({"inputs": PROMPT, "parameters": parameters})
    headers = {"Authorization": f"Bearer {call.key}", "Content-Type": "application/json"}
    connection.request("POST", "/generate_stream", body, headers)
    first = connection.getresponse().readline()
    if b'"token"' not in first:
        raise RuntimeError(f"a stream began with {first!r}")
    return connection


def _running_sequences(call: Call) -> float:
    connection = _connection(call)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("gyrfalcon_sequences_running")]
    return sum(values)


def _connection(call: Call) -> http.client.HTTPConnection:
    parts = urlsplit(call.url)
    return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)


def _outcome(function: Callable[[Call], Any], call: Call) -> dict[str, Any]:
    try:
        result = function(call)
        value = asyncio.run(result) if inspect.iscoroutine(result) else result
    except Exception as error:
        return {"error": {"class": type(error).__name__, "message": str(error)}}
    return {"value": value}


def _plain(value: Any) -> Any:
    """What the clients' own types hold: dataclasses, pydantic models, enumerations."""
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if hasattr(value, "model_dump"):
        return value.model_dump()
    raise TypeError(f"{type(value).__name__} has no JSON form")
