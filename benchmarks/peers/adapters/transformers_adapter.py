"""Transformers: `generate` of a model loaded in the checkpoint's or in single precision."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from exchange import Assignment, Stopwatch, run

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}


class FirstToken:
    """A streamer that only notes when the first new token has come; the prompt comes before it."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch
        self._num_calls = 0

    def put(self, value: object) -> None:
        self._num_calls += 1
        if self._num_calls == 2:
            self._watch.saw_first()

    def end(self) -> None:
        """Nothing is held back."""


class TransformersModel:
    def __init__(self, assignment: Assignment) -> None:
        torch.set_num_threads(assignment.threads)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            assignment.model, dtype=DTYPES[assignment.precision]
        )
        self._model.eval()

    def describe(self) -> dict[str, str]:
        return {"version": transformers.__version__, "torch": torch.__version__}

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new_tokens: int, beams: int) -> dict[str, Any]:
        ids = torch.tensor(prompts)
        watch = Stopwatch()
        # Streamers take one sequence only.
        streamer = FirstToken(watch) if beams == 1 and len(prompts) == 1 else None
        found = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            num_beams=beams,
            pad_token_id=0,
            streamer=streamer,
        )
        return watch.answer([found.shape[1] - ids.shape[1]] * len(prompts))


if __name__ == "__main__":
    run(TransformersModel)
