"""How many threads a model gets."""

from __future__ import annotations

import os

import torch

# Below this a step is so short that threads wait for each other longer than they compute.
ONE_THREAD_BYTES = 4 * 2**20


def choose_num_threads(asked: int | None, weight_bytes: int) -> int:
    """CPU threads of a model: what the operator says, here or to OpenMP; else every core if the model can use them."""
    if asked is not None:
        return asked
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    return 1 if weight_bytes < ONE_THREAD_BYTES else len(os.sched_getaffinity(0))
