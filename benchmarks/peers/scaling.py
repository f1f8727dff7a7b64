"""How our engine grows: python -m benchmarks.peers.scaling [--checkpoint NAME] [--precision int4]

Four tables, each measured in this process through the engine's door, rounds in turn, medians with the least and most:
batch from 1 to 64, context from 32 to 4,000, requests that come at once from 1 to 1,000, and what scheduling takes of
a step with 256 running sequences. Memory is this process's resident size at the end of a level, all levels ascending.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import SHAPES, write_shape
from benchmarks.peers import machine
from benchmarks.peers.engines import HERE
from benchmarks.peers.http_load import percentile
from benchmarks.peers.report import spread
from gyrfalcon.config import Settings
from gyrfalcon.engine.interface import EngineRequest, StepReading, TokenEvent
from gyrfalcon.engine.local import LocalEngine
from gyrfalcon.launch.child import CoreRecipe

BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (32, 128, 512, 1024, 2048, 4000)
WAITING = (1, 10, 100, 1000)
RUNNING = 256  # sequences, for the scheduler's share


@dataclass(frozen=True, slots=True)
class Reading:
    """What one level did in one round. Steps are those that only decoded, with every row of the level in them."""

    tokens_per_s: float  # from the first start to the last token
    step_ms: float  # the median
    first_p50_ms: float
    first_p99_ms: float
    schedule_share: float  # of all steps' time: choosing rows, gathering plans, committing
    resident_gb: float


class Bench:
    """The engine, and what its steps said while the current level ran."""

    def __init__(self, engine: LocalEngine, steps: list[StepReading], vocab_size: int) -> None:
        self._engine = engine
        self._steps = steps
        self._vocab_size = vocab_size
        self._serial = 0

    async def measure(self, rows: int, prompt_tokens: int, new_tokens: int) -> Reading:
        """Requests that come at once, each with a prompt of its own."""
        draw = random.Random(self._serial)
        prompts = [tuple(draw.randrange(self._vocab_size) for _ in range(prompt_tokens)) for _ in range(rows)]
        self._steps.clear()
        start_s = time.perf_counter()
        first_s = await asyncio.gather(*(self._run_one(prompt, new_tokens, start_s) for prompt in prompts))
        seconds = time.perf_counter() - start_s
        await asyncio.sleep(0)  # the last step's reading is delivered after its events
        totals = [one.schedule_s + one.forward_s + one.sample_s + one.commit_s for one in self._steps]
        # With more requests than rows the batch is never whole: any step that only decodes is typical then.
        most = max(one.num_decode_rows for one in self._steps)
        decoding = [
            total
            for one, total in zip(self._steps, totals, strict=True)
            if not one.num_prefill_tokens and one.num_decode_rows == most
        ]
        share = [
            (one.schedule_s + one.commit_s) / total
            for one, total in zip(self._steps, totals, strict=True)
            if not one.num_prefill_tokens and one.num_decode_rows == most
        ]
        return Reading(
            tokens_per_s=rows * new_tokens / seconds,
            step_ms=1000 * statistics.median(decoding or totals),
            first_p50_ms=1000 * percentile(first_s, 50),
            first_p99_ms=1000 * percentile(first_s, 99),
            schedule_share=statistics.median(share) if share else 0.0,
            resident_gb=machine.memory(os.getpid()) / 1e9,
        )

    async def _run_one(self, prompt: tuple[int, ...], new_tokens: int, start_s: float) -> float:
        self._serial += 1
        request = EngineRequest(request_id=str(self._serial), prompt_ids=prompt, max_new_tokens=new_tokens)
        first_s = 0.0
        async for events in self._engine.generate(request):
            if not first_s and any(isinstance(event, TokenEvent) for event in events):
                first_s = time.perf_counter() - start_s
        return first_s


@asynccontextmanager
async def open_bench(
    folder: Path, precision: str, *, max_rows: int, cache_tokens: int, vocab_size: int, threads: int | None
) -> AsyncIterator[Bench]:
    """An engine for the block."""
    chosen: dict[str, Any] = {"dtype": {"bf16": "bfloat16", "float32": "float32"}.get(precision, "bfloat16")}
    if precision in ("int8", "int4"):
        chosen["quantize"] = precision
    settings = Settings(
        model=str(folder),
        log_level="warning",
        num_threads=threads,
        max_batch_size=max_rows,
        max_batch_total_tokens=cache_tokens,
        **chosen,
    )
    steps: list[StepReading] = []
    engine = LocalEngine(CoreRecipe(settings, folder)(lambda done, total: None), on_step=steps.append)
    try:
        bench = Bench(engine, steps, vocab_size)
        await bench.measure(1, 32, 4)
        yield bench
    finally:
        await engine.close()


async def measure(arguments: argparse.Namespace) -> dict[str, dict[str, list[Reading]]]:
    """Readings by table and level."""
    folder = write_shape(arguments.models.resolve() / "checkpoints" / arguments.checkpoint, arguments.checkpoint)
    vocab_size = SHAPES[arguments.checkpoint]["vocab_size"]
    found: dict[str, dict[str, list[Reading]]] = defaultdict(lambda: defaultdict(list))
    new_tokens = 4 if arguments.quick else 32
    batches, contexts = (BATCHES[:4], CONTEXTS[:3]) if arguments.quick else (BATCHES, CONTEXTS)
    waiting = WAITING[:3] if arguments.quick else WAITING
    common = {"vocab_size": vocab_size, "threads": arguments.threads}
    if "sequences" in arguments.tables or "context" in arguments.tables or "requests" in arguments.tables:
        async with open_bench(folder, arguments.precision, max_rows=64, cache_tokens=64 * 192, **common) as bench:
            for turn in range(arguments.rounds):
                levels = [("sequences", rows, rows, 128, new_tokens) for rows in batches]
                levels += [("context", context, 1, context, new_tokens) for context in contexts]
                levels += [("requests", rows, rows, 32, 16) for rows in waiting]
                for table, level, rows, prompt_tokens, new in levels:
                    if table in arguments.tables:
                        reading = await bench.measure(rows, prompt_tokens, new)
                        found[table][f"{level:,}"].append(reading)
                        print(f"round {turn + 1}: {table} {level}: {reading}", flush=True)
    if "running" in arguments.tables:
        running = 16 if arguments.quick else RUNNING
        async with open_bench(
            folder, arguments.precision, max_rows=running, cache_tokens=running * 96, **common
        ) as bench:
            for turn in range(arguments.rounds):
                reading = await bench.measure(running, 32, new_tokens)
                found["running"][f"{running:,}"].append(reading)
                print(f"round {turn + 1}: running {running}: {reading}", flush=True)
    return {table: dict(levels) for table, levels in found.items()}


TABLES = {
    "sequences": "Sequences at once, each of 128 prompt tokens and 32 new ones",
    "context": "Context, one sequence of so many prompt tokens and 32 new ones",
    "requests": "Requests that come at once, each of 32 prompt tokens and 16 new ones, at most 64 of them in the batch",
    "running": "Sequences that run at once, each of 32 prompt tokens and 32 new ones",
}


def render(arguments: argparse.Namespace, found: dict[str, dict[str, list[Reading]]]) -> str:
    parts = [f"{arguments.checkpoint}, {arguments.precision}, {arguments.rounds} rounds."]
    if arguments.quick:
        parts.append("**A quick run, with few tokens: it shows that everything runs, not how fast.**")
    for table, title in TABLES.items():
        if table in found:
            rows = [f"| {level} | " + " | ".join(_cells(readings)) + " |" for level, readings in found[table].items()]
            head = "| | tokens/s | step, ms | first token p50, ms | p99 | scheduling, % of a step | resident, GB |"
            parts.append("\n".join([f"{title}:\n", head, "|---|---|---|---|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _cells(readings: list[Reading]) -> list[str]:
    columns = ("tokens_per_s", "step_ms", "first_p50_ms", "first_p99_ms", "schedule_share", "resident_gb")
    scale = {"schedule_share": 100.0}
    return [spread([scale.get(name, 1.0) * getattr(one, name) for one in readings]) for name in columns]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="falcon-1.2b", choices=list(SHAPES))
    parser.add_argument("--precision", default="bf16", choices=["bf16", "float32", "int8", "int4"])
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="the server's own choice if absent")
    parser.add_argument("--models", type=Path, default=HERE / ".models")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--quick", action="store_true", help="few levels and tokens: does everything run?")
    arguments = parser.parse_args()
    found = asyncio.run(measure(arguments))
    name = f"scaling-{arguments.checkpoint}-{arguments.precision}"
    arguments.results.mkdir(parents=True, exist_ok=True)
    raw = {
        table: {level: [asdict(one) for one in many] for level, many in levels.items()}
        for table, levels in found.items()
    }
    about = {"machine": machine.describe(), "quick": arguments.quick, "readings": raw}
    (arguments.results / f"{name}.json").write_text(json.dumps(about, indent=2) + "\n")
    text = render(arguments, found)
    (arguments.results / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
