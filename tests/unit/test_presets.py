"""The catalogue: what a preset is, and that the package can plan for it without a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gyrfalcon import presets
from gyrfalcon.errors import ModelLoadError
from gyrfalcon.footprint import read_spec
from gyrfalcon.presets import BUNDLED, NAMES, PUBLISHED, Preset, bundled_folder, catalogue, find_preset

PRESETS = {preset.name: preset for preset in catalogue()}


def test_the_four_documented_falcons_come_right_after_the_bundled_model() -> None:
    assert NAMES[:5] == (BUNDLED, "falcon-7b", "falcon-7b-instruct", "falcon-40b", "falcon-40b-instruct")
    assert tuple(PRESETS) == NAMES


@pytest.mark.parametrize(
    ("name", "num_parameters", "kv_bytes", "max_context"),
    [
        ("falcon-7b", 6_921_720_704, 8_192, 2048),
        ("falcon-7b-instruct", 6_921_720_704, 8_192, 2048),
        ("falcon-40b", 41_303_293_952, 122_880, 2048),
        ("falcon-40b-instruct", 41_303_293_952, 122_880, 2048),
        ("falcon-11b", 11_102_822_400, 245_760, 8192),
        ("falcon3-1b-instruct", 1_669_408_768, 73_728, 8192),
        ("falcon3-7b-instruct", 7_455_550_464, 114_688, 32768),
        ("tinyllama-1.1b-chat", 1_100_048_384, 22_528, 2048),
        ("smollm2-1.7b-instruct", 1_711_376_384, 196_608, 8192),
        ("mistral-7b-instruct-v0.3", 7_248_023_552, 131_072, 32768),
    ],
)
def test_a_preset_has_the_published_models_shapes(
    name: str, num_parameters: int, kv_bytes: int, max_context: int
) -> None:
    spec = read_spec(PRESETS[name].config_folder)
    assert (spec.num_parameters, spec.max_context) == (num_parameters, max_context)
    assert spec.kv_bytes_per_token("bfloat16") == kv_bytes


@pytest.mark.parametrize("preset", PUBLISHED, ids=lambda preset: preset.name)
def test_a_preset_names_its_source_and_its_files(preset: Preset) -> None:
    assert preset.source is not None
    assert preset.source.partition("/")[2].lower().startswith(preset.name.partition("-instruct")[0])
    assert preset.command == f"gyrfalcon serve {preset.name}"
    assert (preset.workload, preset.is_distributed) == ("Deployment", False)
    assert not list(preset.config_folder.glob("*.safetensors"))


def test_the_bundled_model_is_planned_from_its_own_files() -> None:
    preset = find_preset(BUNDLED)
    assert preset is not None
    config = json.loads((bundled_folder() / "config.json").read_text(encoding="utf-8"))
    assert preset.config_folder == bundled_folder()
    assert read_spec(preset.config_folder).vocab_size == config["vocab_size"]
    assert sum(path.stat().st_size for path in bundled_folder().iterdir()) <= 16 * 1024**2


def test_an_unknown_name_is_no_preset() -> None:
    assert find_preset("falcon-8b") is None


def test_a_damaged_package_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(presets, "bundled_folder", lambda: tmp_path)
    with pytest.raises(ModelLoadError, match="part of this package, is damaged; install gyrfalcon anew"):
        catalogue()
