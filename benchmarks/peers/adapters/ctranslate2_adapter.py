"""CTranslate2's Generator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ctranslate2
from exchange import Assignment, Stopwatch, run

COMPUTE_TYPES = {"int8": "int8", "bf16": "bfloat16", "float32": "float32"}


class CTranslate2Model:
    def __init__(self, assignment: Assignment) -> None:
        self._generator = ctranslate2.Generator(
            assignment.model,
            device="cpu",
            compute_type=COMPUTE_TYPES[assignment.precision],
            inter_threads=1,
            intra_threads=assignment.threads,
        )
        # Prompts are given as the vocabulary's entries.
        self._tokens: list[str] = json.loads(Path(assignment.model, "vocabulary.json").read_text(encoding="utf-8"))

    def describe(self) -> dict[str, str]:
        return {"version": ctranslate2.__version__, "compute type": self._generator.compute_type}

    def generate(self, prompts: list[list[int]], new_tokens: int, beams: int) -> dict[str, Any]:
        started: set[int] = set()
        watch = Stopwatch()

        def on_token(result: Any) -> bool:
            started.add(result.batch_id)
            if len(started) == len(prompts):
                watch.saw_first()
            return False

        found = self._generator.generate_batch(
            [[self._tokens[token_id] for token_id in prompt] for prompt in prompts],
            max_length=new_tokens,
            min_length=new_tokens,
            beam_size=beams,
            include_prompt_in_result=False,
            callback=on_token if beams == 1 else None,
        )
        return watch.answer([len(one.sequences_ids[0]) for one in found])


if __name__ == "__main__":
    run(CTranslate2Model)
