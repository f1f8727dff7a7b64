"""What a client's script saw, beside what it sent and what plain HTTP says to the same."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gyrfalcon.testing.server import Answer, ServerProcess
from tests.clients.relay import Relay, Sent

# Read and removed at import: the server refuses variables in its name that it does not know.
CLIENTS_ARE_REQUIRED = os.environ.pop("GYRFALCON_REQUIRE_CLIENTS", "") == "1"

SCRIPTS = Path(__file__).resolve().parent / "scripts"
KEY = "a-key"
AUTHORIZATION = {"Authorization": f"Bearer {KEY}"}
PROMPT = "Return the number of"
# With these the server is full; its limits are far below what the scripts' long prompt needs.
MAX_CONCURRENT_REQUESTS = 4
SERVER_ARGUMENTS = (
    *("--api-key", KEY),
    "--open-metrics",
    *("--max-concurrent-requests", str(MAX_CONCURRENT_REQUESTS)),
    *("--max-total-tokens", "800"),
)
SCRIPT_TIMEOUT_S = 100.0
# What programs look for in a message to learn that a prompt is too long: one of two beginnings.
TOO_LONG = r"`inputs` (tokens \+ `max_new_tokens` must be <=|must have less than) \d+.* Given: 1001"
FULL = f"at most {MAX_CONCURRENT_REQUESTS} sequences"


@dataclass(frozen=True, slots=True)
class Failure:
    """What a call raised."""

    name: str  # of the error's class
    message: str


class Seen:
    """What the cases of one script saw, by their names."""

    def __init__(self, server: ServerProcess, outcomes: dict[str, Any], sent: Sequence[Sent]) -> None:
        self._server = server
        self._outcomes = outcomes
        self._sent = sent

    def value(self, case: str) -> Any:
        """What the call returned."""
        outcome = self._outcomes[case]
        assert "value" in outcome, f"{case} raised {outcome['error']}"
        return outcome["value"]

    def failure(self, case: str) -> Failure:
        """What the call raised."""
        outcome = self._outcomes[case]
        assert "error" in outcome, f"{case} returned {outcome['value']}"
        return Failure(outcome["error"]["class"], outcome["error"]["message"])

    def all_sent(self, case: str) -> list[Sent]:
        return [request for request in self._sent if request.headers.get("x-case") == case]

    def sent(self, case: str) -> Sent:
        """The call's only request."""
        (request,) = self.all_sent(case)
        return request

    def plain(self, case: str, **changes: Any) -> Any:
        """What `/generate` says to the call's inputs and parameters: the new text alone, and all its details."""
        return plain(self._server, self.sent(case), **changes)


Observe = Callable[..., Seen]  # of an environment, a script and its arguments


def plain(server: ServerProcess, sent: Sent, **changes: Any) -> Any:
    wanted = {"details": True, "return_full_text": False}
    parameters = sent.body.get("parameters", {}) | wanted | changes
    return generate(server, sent.body["inputs"], **parameters).json()


def generate(server: ServerProcess, inputs: str, **parameters: Any) -> Answer:
    """Ask `/generate` with the key."""
    body = {"inputs": inputs, "parameters": parameters}
    answer = server.request("POST", "/generate", body, headers=AUTHORIZATION)
    assert answer.status == 200, answer.body
    return answer


def call_with(server: ServerProcess, python: Path, home: Path, script: str, *arguments: str) -> Seen:
    """Run a script with its client's interpreter against the server.

    home: an empty folder; the script finds nothing there that a user has stored, such as the hub's token.
    """
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HAYSTACK_TELEMETRY_ENABLED": "False",
        "LANGSMITH_TRACING": "false",
    }
    with Relay(server.port) as relay:
        command = [str(python), str(SCRIPTS / script), *arguments, relay.url, KEY]
        ended = subprocess.run(
            command, env=environ, capture_output=True, text=True, timeout=SCRIPT_TIMEOUT_S, check=False
        )
        assert ended.returncode == 0, ended.stderr
        return Seen(server, json.loads(ended.stdout), relay.sent)
