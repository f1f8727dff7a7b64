"""Builds the engine's core: model, cache and scheduler. Runs in the engine's process."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from gyrfalcon.config import Settings
from gyrfalcon.engine.core import CoreLimits, EngineCore
from gyrfalcon.errors import ModelLoadError, SettingsError
from gyrfalcon.footprint import DEVICE_DEFAULTS, Device, read_spec, stored_codes, weight_bytes
from gyrfalcon.hub import hub_source, unfinished_files
from gyrfalcon.memory import free_bytes
from gyrfalcon.runner.model_runner import load_runner

logger = logging.getLogger(__name__)

# What a step costs besides its tokens, in tokens: see `engine.speculation.least_chance`.
# On CPU 10 to 16 were measured with eyas; the figure is below that, so that drafts are run only where they surely pay.
STEP_COST_TOKENS: dict[Device, int] = {"cpu": 8, "cuda": 128}

# The first generation of NVIDIA's devices (compute capability) that computes in bfloat16.
BFLOAT16_SINCE = (8, 0)


def build_core(settings: Settings, folder: Path, on_progress: Callable[[int, int], None]) -> EngineCore:
    """Load the checkpoint in `folder` as the settings say. Raises SettingsError, ModelLoadError, OutOfCache."""
    device = _choose_device(settings)
    defaults = DEVICE_DEFAULTS[device]
    _check_files(settings, folder)
    dtype = _choose_dtype(settings, folder, device)
    _check_room(settings, folder, dtype, device)
    runner = load_runner(
        folder,
        dtype=dtype,
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
            step_cost_tokens=STEP_COST_TOKENS[device],
        ),
    )


def _choose_device(settings: Settings) -> Device:
    has_cuda = torch.cuda.is_available()
    if settings.device == "cuda" and not has_cuda:
        raise SettingsError("--device", "cuda is asked for, but torch finds no CUDA device; use `--device cpu`")
    if settings.device == "auto":
        return "cuda" if has_cuda else "cpu"
    return settings.device


def _check_files(settings: Settings, folder: Path) -> None:
    """Refuse weights of which a part has not arrived, before anything else is said about them."""
    unfinished = unfinished_files(folder)
    if unfinished:
        shown = ", ".join(f"`{name}`" for name in unfinished[:3]) + (", ..." if len(unfinished) > 3 else "")
        is_fetched = hub_source(settings.model) is not None
        remedy = f"run `gyrfalcon download {settings.model}`" if is_fetched else "copy them again"
        raise ModelLoadError(
            f"--model: {len(unfinished)} weight files of `{settings.model}` are missing or cut short in {folder}: "
            f"{shown}; {remedy}"
        )


def _choose_dtype(settings: Settings, folder: Path, device: Device) -> str:
    """The precision asked for, or the checkpoint's; float16 in place of its bfloat16 where the device lacks that."""
    dtype = read_spec(folder).dtype if settings.dtype == "auto" else settings.dtype
    if dtype != "bfloat16" or device == "cpu" or torch.cuda.get_device_capability() >= BFLOAT16_SINCE:
        return dtype
    major, minor = torch.cuda.get_device_capability()
    lacks = f"{torch.cuda.get_device_name()} (compute capability {major}.{minor}) does not compute in bfloat16"
    if settings.dtype == "auto":
        logger.warning("%s: the checkpoint is served in float16", lacks)
        return "float16"
    raise SettingsError("--dtype", f"{lacks}; say `--dtype float16`")


def _check_room(settings: Settings, folder: Path, dtype: str, device: Device) -> None:
    """Refuse a model whose weights alone are more than there is, before anything is read.

    Nothing else would: a container that takes more than its limit is ended by the kernel without a word.
    """
    asked = settings.quantize
    quantize = asked if asked in ("int8", "int4") else stored_codes(folder)
    needed = weight_bytes(read_spec(folder), dtype, quantize)
    free = free_bytes() if device == "cpu" else int(torch.cuda.mem_get_info()[0])
    if needed > free:
        smaller = "" if quantize else ", --quantize int8 or int4 (on CPU)"
        raise ModelLoadError(
            f"--model: the weights of `{settings.model}` take {needed} bytes in {quantize or dtype}, and {free} bytes "
            f"of memory are free on {device}; choose a smaller --dtype{smaller}, a smaller model, or more memory "
            "(`gyrfalcon fit` works it out)"
        )
