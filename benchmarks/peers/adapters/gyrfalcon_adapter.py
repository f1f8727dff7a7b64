"""Gyrfalcon, in this process: the engine's door, without the text side."""

from __future__ import annotations

import asyncio
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from exchange import Assignment, Stopwatch, run

from gyrfalcon.config import Settings
from gyrfalcon.engine.interface import BeamParams, EngineRequest, TokenEvent
from gyrfalcon.engine.local import LocalEngine
from gyrfalcon.launch.child import CoreRecipe


def make_settings(assignment: Assignment) -> Settings:
    """The server's own settings for what is assigned; everything else stays at its default."""
    settings: dict[str, Any] = {
        "model": assignment.model,
        "log_level": "warning",
        # With all cores to use, the engine chooses itself, as its users have it.
        "num_threads": None if assignment.threads == len(os.sched_getaffinity(0)) else assignment.threads,
        "max_total_tokens": assignment.max_tokens,
        # Beams branch from one sequence and need rows of their own.
        "max_batch_size": max(4, assignment.max_rows),
        "max_batch_total_tokens": max(
            4 * assignment.max_tokens, assignment.max_rows * assignment.max_row_tokens, 2 * assignment.max_tokens
        ),
    }
    if assignment.precision in ("int8", "int4"):
        if "quantize" not in {field.name for field in fields(Settings)}:
            raise NotImplementedError("this gyrfalcon has no setting `quantize`")
        settings |= {"dtype": "bfloat16", "quantize": assignment.precision}
    else:
        settings["dtype"] = {"bf16": "bfloat16", "float32": "float32"}[assignment.precision]
    return Settings(**settings)


class GyrfalconModel:
    """An engine in a thread, driven by an event loop that runs while a request is answered."""

    def __init__(self, assignment: Assignment) -> None:
        self._runner = asyncio.Runner()
        self._engine = self._runner.run(self._start(assignment))
        self._serial = 0

    @staticmethod
    async def _start(assignment: Assignment) -> LocalEngine:
        recipe = CoreRecipe(make_settings(assignment), Path(assignment.model))
        return LocalEngine(recipe(lambda done, total: None))

    def describe(self) -> dict[str, str]:
        import gyrfalcon

        facts = self._engine.facts
        return {
            "version": gyrfalcon.__version__,
            "dtype": facts.dtype,
            "weights": f"{facts.weight_bytes / 1e9:.2f} GB",
            "cache": f"{facts.cache_tokens} tokens",
        }

    def generate(self, prompts: list[list[int]], new_tokens: int, beams: int) -> dict[str, Any]:
        return self._runner.run(self._generate(prompts, new_tokens, beams))

    async def _generate(self, prompts: list[list[int]], new_tokens: int, beams: int) -> dict[str, Any]:
        waiting = len(prompts)
        watch = Stopwatch()

        async def run_one(prompt: list[int]) -> int:
            nonlocal waiting
            self._serial += 1
            request = EngineRequest(
                request_id=str(self._serial),
                prompt_ids=tuple(prompt),
                max_new_tokens=new_tokens,
                beams=BeamParams(num_beams=beams) if beams > 1 else None,
            )
            generated = 0
            async for events in self._engine.generate(request):
                tokens = sum(isinstance(event, TokenEvent) for event in events)
                if tokens and not generated and beams == 1:
                    waiting -= 1
                    if not waiting:
                        watch.saw_first()
                generated += tokens
            return generated

        generated = await asyncio.gather(*(run_one(prompt) for prompt in prompts))
        return watch.answer(list(generated))


if __name__ == "__main__":
    run(GyrfalconModel)
