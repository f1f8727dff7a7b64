"""The adapters' side of the conversation with the runner: JSON lines on standard input and output.

The runner starts an adapter with one argument, a JSON object that `Assignment` is made of. The adapter loads the model,
writes {"ready": {...}}, and then answers every request

    {"prompts": [[id, ...], ...], "new_tokens": n, "beams": b}

with {"seconds": s, "first_s": f or null, "generated": [count, ...]} or {"error": "..."}. The end of its input ends it.
Only the standard library is used here: this file runs in every engine's environment.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Assignment:
    """What one adapter is to run."""

    model: str  # the checkpoint as this engine reads it: a folder or a file
    checkpoint: str  # the folder of the Hugging Face checkpoint it was made from
    precision: str
    threads: int
    max_tokens: int  # longest sequence, prompt and new tokens together
    max_rows: int  # sequences at once
    max_row_tokens: int  # tokens of a sequence when there are max_rows of them


@dataclass
class Stopwatch:
    """Times of one request, from its making on."""

    start_s: float = field(default_factory=time.perf_counter)
    first_s: float | None = None

    def saw_first(self) -> None:
        """Note the moment at which every sequence has its first token; later calls change nothing."""
        if self.first_s is None:
            self.first_s = time.perf_counter() - self.start_s

    def answer(self, generated: list[int]) -> dict[str, Any]:
        return {"seconds": time.perf_counter() - self.start_s, "first_s": self.first_s, "generated": generated}


class Model(Protocol):
    """A loaded model of one engine."""

    def describe(self) -> dict[str, str]:
        """Versions and settings worth writing into the report."""
        ...

    def generate(self, prompts: list[list[int]], new_tokens: int, beams: int) -> dict[str, Any]:
        """Continue every prompt by exactly `new_tokens` tokens, greedily or by beam search; a Stopwatch's answer.

        Raises NotImplementedError for what the engine cannot do.
        """
        ...


def run(load: Callable[[Assignment], Model]) -> None:
    """Load the model that the command line assigns, and answer requests until the input ends."""
    # What libraries print goes to the log; the conversation keeps the real standard output to itself.
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        output.write(json.dumps(message) + "\n")
        output.flush()

    assignment = Assignment(**json.loads(sys.argv[1]))
    try:
        model = load(assignment)
    except Exception as error:
        traceback.print_exc()
        send({"error": _shown(error)})
        return
    send({"ready": model.describe()})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            send(model.generate(request["prompts"], request["new_tokens"], request["beams"]))
        except Exception as error:
            traceback.print_exc()
            send({"error": _shown(error)})


def _shown(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:300]
