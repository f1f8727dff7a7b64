"""onnxruntime-genai: its generator, stepped token by token."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnxruntime_genai
from exchange import Assignment, Stopwatch, run


class OnnxRuntimeModel:
    def __init__(self, assignment: Assignment) -> None:
        config = onnxruntime_genai.Config(assignment.model)
        session_options = {"intra_op_num_threads": assignment.threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session_options}}}))
        self._model = onnxruntime_genai.Model(config)

    def describe(self) -> dict[str, str]:
        return {"version": onnxruntime_genai.__version__}

    def generate(self, prompts: list[list[int]], new_tokens: int, beams: int) -> dict[str, Any]:
        num_total = len(prompts[0]) + new_tokens
        parameters = onnxruntime_genai.GeneratorParams(self._model)
        parameters.set_search_options(
            max_length=num_total, min_length=num_total, batch_size=len(prompts), num_beams=beams, do_sample=False
        )
        watch = Stopwatch()
        generator = onnxruntime_genai.Generator(self._model, parameters)
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        while not generator.is_done():
            generator.generate_next_token()
            if beams == 1:
                watch.saw_first()
        lengths = [len(generator.get_sequence(row)) - len(prompt) for row, prompt in enumerate(prompts)]
        return watch.answer(lengths)


if __name__ == "__main__":
    run(OnnxRuntimeModel)
