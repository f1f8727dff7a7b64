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
# More tokens than the server's limit for a sequence.
LONG_PROMPT = "number " * 1000
# Goes on and on: what is in the prompt is made likely, and the end is not in it.
ENDLESS_PROMPT = "of the number " * 24
ENDLESS = {"max_new_tokens": 700, "repetition_penalty": 0.2}
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
    before = num_dropped(call)
    streams = [_open_stream(call) for _ in range(num_requests)]
    try:
        yield
    finally:
        for stream in streams:
            stream.close()
        until_dropped(call, before + num_requests)


def num_dropped(call: Call) -> int:
    """How many requests the server has dropped because their clients left."""
    return int(_metric(call, 'tgi_request_failure{err="dropped"}'))


def until_dropped(call: Call, num_requests: int, timeout_s: float = 20.0) -> bool:
    """Wait until that many requests are dropped and nothing is in work. True, so that a case can return it."""
    deadline = time.monotonic() + timeout_s
    while num_dropped(call) < num_requests or _metric(call, "gyrfalcon_sequences_running{") > 0:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{num_dropped(call)} requests are dropped after {timeout_s} s, not {num_requests}")
        time.sleep(0.02)
    return True


def _open_stream(call: Call) -> http.client.HTTPResponse:
    """A long stream whose first event has arrived."""
    body = json.dumps({"inputs": ENDLESS_PROMPT, "parameters": ENDLESS})
    headers = {"Authorization": f"Bearer {call.key}", "Content-Type": "application/json"}
    connection = _connection(call)
    connection.request("POST", "/generate_stream", body, headers)
    stream = connection.getresponse()
    first = stream.readline()
    if b'"token"' not in first:
        raise RuntimeError(f"a stream began with {first!r}")
    return stream


def _metric(call: Call, beginning: str) -> float:
    """The sum of the metrics whose lines begin so."""
    connection = _connection(call)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(beginning))


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
