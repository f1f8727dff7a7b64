"""The catalogue's figures and the bundled checkpoint's folder."""

from __future__ import annotations

import json

import pytest

from gyrfalcon.presets import BUNDLED, NAMES, Preset, bundled_folder, catalogue

PRESETS = {preset.name: preset for preset in catalogue()}


def test_the_catalogue_lists_every_name_the_bundled_one_first() -> None:
    assert tuple(PRESETS) == NAMES
    assert NAMES == ("eyas", "falcon-7b", "falcon-7b-instruct", "falcon-40b", "falcon-40b-instruct")


def falcon_parameters(hidden: int, layers: int, heads: int, kv_heads: int, norms: int) -> int:
    """Parameters of a Falcon with tied embeddings, counted from its shape."""
    head_size = hidden // heads
    block = hidden * (heads + 2 * kv_heads) * head_size + hidden * hidden + 2 * 4 * hidden * hidden + norms * 2 * hidden
    return 65024 * hidden + layers * block + 2 * hidden


@pytest.mark.parametrize(
    ("names", "num_parameters", "kv_bytes"),
    [
        (("falcon-7b", "falcon-7b-instruct"), falcon_parameters(4544, 32, 71, 1, 1), 32 * 2 * 64 * 2),
        (("falcon-40b", "falcon-40b-instruct"), falcon_parameters(8192, 60, 128, 8, 2), 60 * 2 * 8 * 64 * 2),
    ],
)
def test_figures_follow_from_the_models_shape(names: tuple[str, ...], num_parameters: int, kv_bytes: int) -> None:
    for name in names:
        assert PRESETS[name].num_parameters == num_parameters
        assert PRESETS[name].kv_bytes_per_token == kv_bytes
        assert PRESETS[name].source == f"tiiuae/{name}"


@pytest.mark.parametrize(("precision", "gib"), [("float32", 25.8), ("bfloat16", 12.9), ("int8", 6.4), ("int4", 3.2)])
def test_memory_is_that_of_the_weights(precision: str, gib: float) -> None:
    assert PRESETS["falcon-7b"].weight_bytes(precision) / 1024**3 == pytest.approx(gib, abs=0.06)


def test_the_bundled_preset_is_described_by_its_own_files() -> None:
    preset: Preset = PRESETS[BUNDLED]
    config = json.loads((bundled_folder() / "config.json").read_text(encoding="utf-8"))
    weights = sum(path.stat().st_size for path in bundled_folder().glob("*.safetensors"))
    assert preset.source is None
    # Stored at 16 or 32 bit, with a header of a few kilobytes.
    assert weights / 4 - 20_000 < preset.num_parameters < weights / 2
    assert preset.num_parameters > config["vocab_size"] * config["hidden_size"]
    assert sum(path.stat().st_size for path in bundled_folder().iterdir()) <= 16 * 1024**2
