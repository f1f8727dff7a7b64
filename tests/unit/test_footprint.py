"""Memory worked out from config.json: against published figures, and against a process that runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks.footprint import Case, measure
from gyrfalcon.errors import OutOfCache, SettingsError
from gyrfalcon.footprint import (
    DEFAULT_CONTEXT,
    DEVICE_DEFAULTS,
    INT4_GROUP,
    Load,
    activation_bytes,
    block_bytes,
    cache_bytes,
    footprint,
    largest_batch,
    largest_context,
    num_cache_blocks,
    num_devices,
    plan_load,
    read_spec,
    stored_codes,
    weight_bytes,
    world_sizes,
)
from gyrfalcon.presets import bundled_folder, find_preset

GIB = 1024**3
LOAD = Load(context=2048, concurrency=16, token_budget=4096)


def spec_of(name: str):
    preset = find_preset(name)
    assert preset is not None
    return read_spec(preset.config_folder)


SEVEN, FORTY, EYAS = spec_of("falcon-7b"), spec_of("falcon-40b"), spec_of("eyas")


@pytest.mark.parametrize(
    ("spec", "dtype", "expected"),
    [(SEVEN, "bfloat16", 13_843_441_408), (SEVEN, "float32", 27_686_882_816), (FORTY, "bfloat16", 82_606_587_904)],
)
def test_weights_are_the_distinct_parameters(spec, dtype: str, expected: int) -> None:
    assert weight_bytes(spec, dtype) == expected


@pytest.mark.parametrize(
    ("spec", "quantize", "gigabytes"),
    # Blocks as codes (6.626 and 40.77 G), a copy of the tied head as int8, the embedding in 16 bits, scales.
    [(SEVEN, "int8", 7.515), (SEVEN, "int4", 4.408), (FORTY, "int8", 42.39), (FORTY, "int4", 23.26)],
)
def test_codes_take_less_and_their_scales_are_counted(spec, quantize, gigabytes: float) -> None:
    assert weight_bytes(spec, "bfloat16", quantize) / 1e9 == pytest.approx(gigabytes, rel=2e-3)


def test_a_short_last_group_has_a_scale_too() -> None:
    spec = dataclasses.replace(EYAS, ffn_size=EYAS.ffn_size + 2)
    more = weight_bytes(spec, "bfloat16", "int4") - weight_bytes(EYAS, "bfloat16", "int4")
    # Two more outputs of 256 inputs, and for each of 256 outputs one byte of codes and one scale.
    each_layer = 2 * (256 // 2 + 256 // INT4_GROUP * 2) + 256 * (1 + 2)
    assert more == EYAS.num_layers * each_layer


def test_a_token_of_the_cache_is_what_the_pages_say() -> None:
    assert block_bytes(SEVEN, "bfloat16", 32) == 32 * 8192
    assert block_bytes(FORTY, "float16", 32) == 32 * 122_880
    blocks = 16 * 64 + 1
    assert cache_bytes(SEVEN, "bfloat16", LOAD) == blocks * 32 * 8192


def test_activations_grow_with_the_step_and_with_the_batch() -> None:
    small = activation_bytes(SEVEN, "bfloat16", LOAD, "cuda")
    assert activation_bytes(SEVEN, "bfloat16", dataclasses.replace(LOAD, token_budget=8192), "cuda") > small
    assert activation_bytes(SEVEN, "bfloat16", dataclasses.replace(LOAD, concurrency=4096), "cuda") > small


def test_what_fits_is_the_largest_that_fits() -> None:
    room = 16 * GIB
    batch = largest_batch(room, SEVEN, LOAD, dtype="bfloat16")
    assert footprint(SEVEN, dataclasses.replace(LOAD, concurrency=batch), dtype="bfloat16").total <= room
    assert footprint(SEVEN, dataclasses.replace(LOAD, concurrency=batch + 1), dtype="bfloat16").total > room
    assert largest_context(room, SEVEN, LOAD, dtype="bfloat16") == 2048
    tight = footprint(FORTY, dataclasses.replace(LOAD, context=700), dtype="bfloat16").total
    assert 700 <= largest_context(tight, FORTY, LOAD, dtype="bfloat16") < 700 + 32
    assert largest_batch(8 * GIB, SEVEN, LOAD, dtype="bfloat16") == 0
    assert largest_context(8 * GIB, SEVEN, LOAD, dtype="bfloat16") == 0


def test_devices_share_whole_kv_heads() -> None:
    assert world_sizes(SEVEN) == [1]
    assert world_sizes(FORTY) == [1, 2, 4, 8]
    assert num_devices(80 * GIB, FORTY, LOAD, dtype="bfloat16") == 2
    assert num_devices(140 * GIB, FORTY, LOAD, dtype="bfloat16") == 1
    assert num_devices(24 * GIB, FORTY, LOAD, dtype="bfloat16") == 4
    assert num_devices(8 * GIB, SEVEN, LOAD, dtype="bfloat16") is None


def test_a_load_is_that_of_the_model_unless_it_is_given() -> None:
    assert plan_load(SEVEN, device="cuda").context == 2048
    assert plan_load(spec_of("falcon3-7b-instruct"), device="cuda").context == DEFAULT_CONTEXT
    assert plan_load(SEVEN, device="cpu", context=100, concurrency=3) == Load(100, 3, 512)
    with pytest.raises(SettingsError, match="--context: 4096 exceeds the 2048 tokens"):
        plan_load(SEVEN, device="cpu", context=4096)


def size(**options: object) -> int:
    given = {
        "dtype": "float32",
        "block_size": 32,
        "free_bytes": GIB,
        "where": "cpu",
        "max_rows": 4,
        "cache_fraction": 0.5,
    }
    return num_cache_blocks(EYAS, **(given | options))  # type: ignore[arg-type]


def test_the_cache_is_sized_by_what_is_given_first() -> None:
    one = block_bytes(EYAS, "float32", 32)
    assert size(cache_tokens=100) == 4
    assert size(cache_bytes=10 * one + 1) == 10
    assert size() == 4 * 32
    assert size(max_total_tokens=64) == 4 * 2
    assert size(max_rows=100_000) == GIB // 2 // one - 1


def test_a_cache_that_does_not_fit_is_refused_with_the_settings_that_change_it() -> None:
    one = block_bytes(EYAS, "float32", 32)
    with pytest.raises(OutOfCache, match="--kv-cache-memory or --max-batch-total-tokens"):
        size(cache_tokens=32 * 10, free_bytes=10 * one)
    assert size(cache_tokens=32 * 10, free_bytes=11 * one) == 10  # one is for padding
    with pytest.raises(OutOfCache):
        size(free_bytes=one)


def test_stored_codes_are_those_of_the_configuration(tmp_path: Path) -> None:
    assert stored_codes(bundled_folder()) is None
    section = '{"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": false, "sym": true}'
    (tmp_path / "config.json").write_text(f'{{"quantization_config": {section}}}')
    assert stored_codes(tmp_path) == "int4"


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_a_process_takes_what_was_worked_out(quantize: str) -> None:
    case = Case(str(bundled_folder()), "float32", context=256, concurrency=8, quantize=quantize)
    figures = measure(case)
    predicted, measured, reported = figures["predicted"], figures["measured"], figures["reported"]
    assert reported["weights"] == pytest.approx(predicted["weights"], rel=0.05)
    assert reported["cache"] == predicted["cache"]
    # With the libraries' own part: the buffers of so small a model are within its noise.
    whole = measured["before"] + measured["total"]
    assert whole == pytest.approx(measured["before"] + predicted["total"], rel=0.05)
    assert measured["before"] == pytest.approx(DEVICE_DEFAULTS["cpu"].runtime_bytes, rel=0.25)
