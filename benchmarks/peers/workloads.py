"""What is measured, and how a figure follows from what an engine reports."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from benchmarks.checkpoints import SHAPES

Kind = Literal["decode", "overhead", "prefill", "throughput", "start", "http"]


@dataclass(frozen=True, slots=True)
class Workload:
    """One thing every engine is asked to do.

    kind: which figure is taken. tokens: prompt and new ones of each row; where decoding is measured the first new
    token, which belongs to the prompt's computation, comes on top. shapes: the checkpoints it is meant for; empty for
    all but the tiny one. usual_s: about how long one measurement takes, for the estimate before a first round.
    """

    name: str
    title: str
    kind: Kind
    rows: int
    prompt_tokens: int
    new_tokens: int
    beams: int = 1
    shapes: tuple[str, ...] = ()
    usual_s: float = 20.0

    def is_for(self, shape: str) -> bool:
        return shape in self.shapes if self.shapes else shape != "tiny"

    @property
    def total_tokens(self) -> int:
        """Tokens of one row at its end."""
        return self.prompt_tokens + self.asked_tokens

    @property
    def asked_tokens(self) -> int:
        return self.new_tokens + (1 if self.kind in ("decode", "overhead") else 0)

    def request(self, vocab_size: int, seed: int) -> dict[str, Any]:
        """Random prompts, other ones for every seed: no prefix is ever met again."""
        draw = random.Random(f"{self.name} {seed}")
        prompts = [[draw.randrange(vocab_size) for _ in range(self.prompt_tokens)] for _ in range(self.rows)]
        return {"prompts": prompts, "new_tokens": self.asked_tokens, "beams": self.beams}

    def warm_up(self, vocab_size: int) -> dict[str, Any]:
        """A smaller request of the same form; what is lazy in an engine is paid for by it."""
        small = replace(
            self, rows=min(self.rows, 4), prompt_tokens=min(self.prompt_tokens, 128), new_tokens=min(self.new_tokens, 3)
        )
        return small.request(vocab_size, seed=-1)

    def figures(self, answer: Mapping[str, Any]) -> dict[str, float]:
        """What an adapter's answer means. Raises ValueError when it did not do what was asked."""
        generated: list[int] = answer["generated"]
        if generated != [self.asked_tokens] * self.rows:
            raise ValueError(f"generated {generated} tokens instead of {self.asked_tokens} for {self.rows} rows")
        seconds, first_s = answer["seconds"], answer["first_s"]
        if self.kind in ("decode", "overhead"):
            if first_s is None:
                raise ValueError("the adapter did not see the first token")
            step_s = (seconds - first_s) / self.new_tokens
            return {"tokens_per_s": 1 / step_s} if self.kind == "decode" else {"us_per_token": 1e6 * step_s}
        if self.kind == "prefill":
            return {"tokens_per_s": self.rows * self.prompt_tokens / seconds}
        return {"tokens_per_s": self.rows * self.new_tokens / seconds}

    def shrunk(self) -> Workload:
        """The same with an eighth of the tokens, on every checkpoint: shows that everything runs, not how fast."""
        return replace(
            self,
            shapes=tuple(SHAPES),
            prompt_tokens=max(4, self.prompt_tokens // 8),
            new_tokens=max(1, self.new_tokens // 8),
            usual_s=self.usual_s / 8,
        )


WORKLOADS = (
    Workload("decode-32", "decode, context 32, tokens/s", "decode", 1, 32, 64, usual_s=8),
    Workload("decode-2048", "decode, context 2,048, tokens/s", "decode", 1, 2048, 64, usual_s=18),
    Workload("prefill-1024", "prefill 1,024, tokens/s", "prefill", 1, 1024, 1, usual_s=4),
    Workload("rows-16", "16 x (128 + 128), tokens/s", "throughput", 16, 128, 128, usual_s=28),
    Workload("rows-32", "32 x (128 + 128), tokens/s", "throughput", 32, 128, 128, usual_s=45),
    Workload("beams-4", "4 beams, 128 + 64, tokens/s", "throughput", 1, 128, 64, beams=4, usual_s=10),
    Workload("overhead", "tiny shape, µs a token", "overhead", 1, 32, 256, shapes=("tiny",), usual_s=3),
    Workload("start", "process start to first token, s", "start", 1, 32, 64, usual_s=15),
    Workload("http-1", "1 client, tokens/s", "http", 1, 128, 64, usual_s=15),
    Workload("http-8", "8 clients, tokens/s", "http", 8, 128, 64, usual_s=20),
    Workload("http-32", "32 clients, tokens/s", "http", 32, 128, 64, usual_s=35),
)


def choose(names: list[str]) -> list[Workload]:
    """The workloads called so, all for none. Raises ValueError on an unknown name."""
    known = [workload.name for workload in WORKLOADS]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no workload is called {', '.join(unknown)}; there are {', '.join(known)}")
    return [workload for workload in WORKLOADS if not names or workload.name in names]
