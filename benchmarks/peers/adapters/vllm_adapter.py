"""vLLM's CPU build, offline: requests are added to its engine, which is stepped until they have finished."""

from __future__ import annotations

import os
import time
from typing import Any

from exchange import Assignment, Stopwatch, run

DTYPES = {"bf16": "bfloat16", "float32": "float32"}


class VllmModel:
    def __init__(self, assignment: Assignment) -> None:
        cores = sorted(os.sched_getaffinity(0))[: assignment.threads]
        # All cores compute: by default one may be kept free for the front process.
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(str(core) for core in cores)
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        import vllm

        self._vllm = vllm
        self._llm = vllm.LLM(
            model=assignment.model,
            dtype=DTYPES[assignment.precision],
            max_model_len=assignment.max_tokens,
            max_num_seqs=max(4, assignment.max_rows),
            enable_prefix_caching=False,
        )
        self._serial = 0

    def describe(self) -> dict[str, str]:
        import torch

        return {
            "version": self._vllm.__version__,
            "torch": torch.__version__,
            "cache": f"{os.environ['VLLM_CPU_KVCACHE_SPACE']} GiB",
        }

    def generate(self, prompts: list[list[int]], new_tokens: int, beams: int) -> dict[str, Any]:
        if beams > 1:
            return self._search(prompts, new_tokens, beams)
        parameters = self._vllm.SamplingParams(
            temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        engine = self._llm.llm_engine
        generated: dict[str, int] = {}
        watch = Stopwatch()
        for prompt in prompts:
            self._serial += 1
            engine.add_request(str(self._serial), {"prompt_token_ids": prompt}, parameters)
        while engine.has_unfinished_requests():
            for output in engine.step():
                generated[output.request_id] = len(output.outputs[0].token_ids)
            if len(generated) == len(prompts):
                watch.saw_first()
        return watch.answer(list(generated.values()))

    def _search(self, prompts: list[list[int]], new_tokens: int, beams: int) -> dict[str, Any]:
        parameters = self._vllm.sampling_params.BeamSearchParams(
            beam_width=beams, max_tokens=new_tokens, ignore_eos=True
        )
        watch = Stopwatch()
        found = self._llm.beam_search([{"prompt_token_ids": prompt} for prompt in prompts], parameters)
        seconds = time.perf_counter() - watch.start_s
        lengths = [len(one.sequences[0].tokens) - len(prompt) for one, prompt in zip(found, prompts, strict=True)]
        return watch.answer(lengths) | {"seconds": seconds}


if __name__ == "__main__":
    run(VllmModel)
