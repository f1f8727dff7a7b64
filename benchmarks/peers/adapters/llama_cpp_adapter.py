"""llama.cpp, through the C functions that llama-cpp-python exposes: one batch of all sequences a step."""

from __future__ import annotations

import ctypes
from importlib.metadata import version
from typing import Any

import llama_cpp
import numpy as np
from exchange import Assignment, Stopwatch, run

BATCH_TOKENS = 2048
"""Most tokens handed over at once; llama.cpp's own default."""


class LlamaCppModel:
    def __init__(self, assignment: Assignment) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            assignment.model.encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {assignment.model}; its log says why")
        settings = llama_cpp.llama_context_default_params()
        # One cache for all sequences, as it is shared in the other engines: a long one may use what many short ones do.
        settings.n_ctx = max(assignment.max_tokens, assignment.max_rows * assignment.max_row_tokens)
        settings.kv_unified = True
        settings.n_seq_max = assignment.max_rows
        settings.n_batch = BATCH_TOKENS
        settings.n_threads = settings.n_threads_batch = assignment.threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context; its log says why")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)

    def describe(self) -> dict[str, str]:
        return {"version": version("llama-cpp-python"), "build": llama_cpp.llama_print_system_info().decode().strip()}

    def generate(self, prompts: list[list[int]], new_tokens: int, beams: int) -> dict[str, Any]:
        if beams > 1:
            raise NotImplementedError("llama.cpp has no beam search")
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        watch = Stopwatch()
        newest = self._prefill(prompts)
        watch.saw_first()
        for step in range(1, new_tokens):
            self._batch.n_tokens = 0
            for row, prompt in enumerate(prompts):
                self._add(newest[row], len(prompt) + step - 1, row, wants_logits=True)
            self._decode()
            newest = [self._greedy(index) for index in range(len(prompts))]
        return watch.answer([new_tokens] * len(prompts))

    def _prefill(self, prompts: list[list[int]]) -> list[int]:
        """Compute the prompts in batches as full as possible; the token after each."""
        newest = [0] * len(prompts)
        ends: list[tuple[int, int]] = []  # row, and its place in the batch, of prompts that end in it
        self._batch.n_tokens = 0

        def flush() -> None:
            self._decode()
            for row, index in ends:
                newest[row] = self._greedy(index)
            ends.clear()
            self._batch.n_tokens = 0

        for row, prompt in enumerate(prompts):
            for position, token_id in enumerate(prompt):
                is_last = position == len(prompt) - 1
                if is_last:
                    ends.append((row, self._batch.n_tokens))
                self._add(token_id, position, row, wants_logits=is_last)
                if self._batch.n_tokens == BATCH_TOKENS:
                    flush()
        if self._batch.n_tokens:
            flush()
        return newest

    def _add(self, token_id: int, position: int, row: int, *, wants_logits: bool) -> None:
        index = self._batch.n_tokens
        self._batch.token[index] = token_id
        self._batch.pos[index] = position
        self._batch.n_seq_id[index] = 1
        self._batch.seq_id[index][0] = row
        self._batch.logits[index] = wants_logits
        self._batch.n_tokens = index + 1

    def _decode(self) -> None:
        status = llama_cpp.llama_decode(self._context, self._batch)
        if status != 0:
            raise RuntimeError(f"llama_decode answered {status}")

    def _greedy(self, index: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, index)
        address = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(address, shape=(self._vocab_size,)).argmax())


if __name__ == "__main__":
    run(LlamaCppModel)
