"""Builds the engine's core: model, cache and scheduler. Runs in the engine's process."""

from __future__ import annotations

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
    step_cost_tokens: int  # what a step costs besides its tokens, in tokens: see `engine.speculation.least_chance`


DEFAULTS = {
    "cpu": DeviceDefaults(token_budget=512, cache_fraction=0.5, step_cost_tokens=16),
    "cuda": DeviceDefaults(token_budget=4096, cache_fraction=0.9, step_cost_tokens=128),
}


def build_core(settings: Settings, folder: Path, on_progress: Callable[[int, int], None]) -> EngineCore:
    """Load the checkpoint in `folder` as the settings say. Raises SettingsError, ModelLoadError, OutOfCache."""
    device = _choose_device(settings)
    defaults = DEFAULTS[device]
    runner = load_runner(
        folder,
        dtype=settings.dtype,
        device=device,
        quantize=settings.quantize,
        block_size=settings.block_size,
        max_rows=settings.max_batch_size,
        max_total_tokens=settings.max_total_tokens,
        cache_tokens=settings.max_batch_total_tokens,
        cache_bytes=settings.kv_cache_memory,
        cache_fraction=settings.kv_cache_fraction or defaults.cache_fraction,
        num_threads=settings.num_threads,
        keeps_packed=settings.packed_cache != "off",
        packed_directory=None if settings.packed_cache in ("auto", "off") else Path(settings.packed_cache),
        on_progress=on_progress,
    )
    return EngineCore(
        runner,
        CoreLimits(
            max_total_tokens=settings.max_total_tokens,
            token_budget=settings.max_batch_prefill_tokens or defaults.token_budget,
            max_rows=settings.max_batch_size,
            prefix_caching=settings.prefix_caching,
            max_draft_tokens=settings.speculate,
            step_cost_tokens=defaults.step_cost_tokens,
        ),
    )


def _choose_device(settings: Settings) -> str:
    has_cuda = torch.cuda.is_available()
    if settings.device == "cuda" and not has_cuda:
        raise SettingsError("--device", "cuda is asked for, but torch finds no CUDA device; use `--device cpu`")
    if settings.device == "auto":
        return "cuda" if has_cuda else "cpu"
    return settings.device
