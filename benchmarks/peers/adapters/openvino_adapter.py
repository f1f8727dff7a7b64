"""OpenVINO GenAI's LLMPipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino
import openvino_genai
from exchange import Assignment, Stopwatch, run


class OpenVinoModel:
    def __init__(self, assignment: Assignment) -> None:
        self._pipeline = openvino_genai.LLMPipeline(
            assignment.model, "CPU", INFERENCE_NUM_THREADS=assignment.threads, PERFORMANCE_HINT="LATENCY"
        )

    def describe(self) -> dict[str, str]:
        return {"version": openvino_genai.__version__, "openvino": openvino.__version__}

    def generate(self, prompts: list[list[int]], new_tokens: int, beams: int) -> dict[str, Any]:
        ids = np.array(prompts, dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        settings = openvino_genai.GenerationConfig(
            max_new_tokens=new_tokens, ignore_eos=True, do_sample=False, num_beams=beams, apply_chat_template=False
        )
        watch = Stopwatch()

        class FirstToken(openvino_genai.StreamerBase):
            """Notes when the first token has come; takes one sequence only."""

            def write(self, token: int | list[int]) -> openvino_genai.StreamingStatus:
                watch.saw_first()
                return openvino_genai.StreamingStatus.RUNNING

            def end(self) -> None:
                """Nothing is held back."""

        streamer = [FirstToken()] if beams == 1 and len(prompts) == 1 else []
        found = self._pipeline.generate(inputs, settings, *streamer)
        return watch.answer([len(tokens) for tokens in found.tokens])


if __name__ == "__main__":
    run(OpenVinoModel)
