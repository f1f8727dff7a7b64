"""Builds the engine's core: model, cache and scheduler. Runs in the engine's process."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from gyrfalcon.config import Settings
from gyrfalcon.engine.core import CoreLimits, EngineCore
from gyrfalcon.errors import SettingsError
from gyrfalcon.runner.model_runner import load_runner


@dataclass(frozen=True, slots=True)
class DeviceDefaults:
    """What settings left open are on a device."""

    token_budget: int  # tokens of a step: long enough to fill the device, short enough for running streams to go on
    cache_fraction: float  # of the memory that is free once the weights are loaded


DEFAULTS = {
    "cpu": DeviceDefaults(token_budget=512, cache_fraction=0.5),
    "cuda": DeviceDefaults(token_budget=4096, cache_fraction=0.9),
}


# Below this a step is so short that threads wait for each other longer than they compute.
ONE_THREAD_BYTES = 64 * 2**20


def build_core(settings: Settings, folder: Path, on_progress: Callable[[int, int], None]) -> EngineCore:
    """Load the checkpoint in `folder` as the settings say. Raises SettingsError, ModelLoadError, OutOfCache."""
    device = _choose_device(settings)
    defaults = DEFAULTS[device]
    runner = load_runner(
        folder,
        dtype=settings.dtype,
        device=device,
        block_size=settings.block_size,
        max_rows=settings.max_batch_size,
        max_total_tokens=settings.max_total_tokens,
        cache_tokens=settings.max_batch_total_tokens,
        cache_bytes=settings.kv_cache_memory,
        cache_fraction=settings.kv_cache_fraction or defaults.cache_fraction,
        on_progress=on_progress,
    )
    if device == "cpu":
        torch.set_num_threads(_choose_num_threads(settings, runner.facts.weight_bytes))
    return EngineCore(
        runner,
        CoreLimits(
            max_total_tokens=settings.max_total_tokens,
            token_budget=settings.max_batch_prefill_tokens or defaults.token_budget,
            max_rows=settings.max_batch_size,
            prefix_caching=settings.prefix_caching,
        ),
    )


def _choose_num_threads(settings: Settings, weight_bytes: int) -> int:
    """What the operator says, here or to OpenMP; else every core for a model that can use them."""
    if settings.num_threads is not None:
        return settings.num_threads
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    return 1 if weight_bytes < ONE_THREAD_BYTES else len(os.sched_getaffinity(0))


def _choose_device(settings: Settings) -> str:
    has_cuda = torch.cuda.is_available()
    if settings.device == "cuda" and not has_cuda:
        raise SettingsError("--device", "cuda is asked for, but torch finds no CUDA device; use `--device cpu`")
    if settings.device == "auto":
        return "cuda" if has_cuda else "cpu"
    return settings.device
