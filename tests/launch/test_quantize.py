"""`--quantize` from the settings to the weights."""

from __future__ import annotations

from typing import Literal

import pytest

from gyrfalcon.config import Settings
from gyrfalcon.errors import SettingsError
from gyrfalcon.launch.device import build_core
from gyrfalcon.presets import bundled_folder


def weight_bytes(quantize: Literal["int8", "int4", "gptq"] | None) -> int:
    settings = Settings(
        device="cpu", dtype="float32", quantize=quantize, packed_cache="off", max_batch_total_tokens=64, num_threads=1
    )
    core = build_core(settings, bundled_folder(), lambda done, total: None)
    try:
        return core.facts.weight_bytes
    finally:
        core.close()


def test_fewer_bits_are_fewer_bytes() -> None:
    plain, int8, int4 = weight_bytes(None), weight_bytes("int8"), weight_bytes("int4")

    # In float32 the embedding is a fifth of the model; it stays, and its head gets codes besides.
    assert int8 < 0.5 * plain
    assert int4 < 0.5 * plain


def test_a_checkpoint_is_not_taken_for_what_it_is_not() -> None:
    with pytest.raises(SettingsError, match="--quantize: `gptq` is for checkpoints stored so, and .* is not quantised"):
        weight_bytes("gptq")
