"""What config.json says about codes, and what `--quantize` may ask for beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gyrfalcon.errors import ModelLoadError, SettingsError
from gyrfalcon.models.quantisation import StoredFormat, check_request, read_format
from tests.unit.models.packed_checkpoints import awq, compressed, gptq

TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
AWQ_OLD = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}


def read(folder: Path, section: dict[str, Any] | None) -> StoredFormat | None:
    config = {} if section is None else {"quantization_config": section}
    (folder / "config.json").write_text(json.dumps(config))
    return read_format(folder)


def test_most_checkpoints_store_their_weights_as_they_are(tmp_path: Path) -> None:
    assert read(tmp_path, None) is None


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (gptq(), StoredFormat("gptq", "gptq", 4, 32, True, zero_offset=1)),
        (gptq(group_size=-1, bits=8), StoredFormat("gptq", "gptq", 8, 0, True, zero_offset=1)),
        (gptq(checkpoint_format="gptq_v2"), StoredFormat("gptq", "gptq", 4, 32, True)),
        (gptq(dynamic={}, lm_head=False, meta={"quantizer": []}), StoredFormat("gptq", "gptq", 4, 32, True, 1)),
        (awq(modules_to_not_convert=None), StoredFormat("awq", "awq", 4, 32, True)),
        (AWQ_OLD, StoredFormat("awq", "awq", 4, 64, True)),
        (compressed(), StoredFormat("compressed-tensors", "packed", 4, 32, False)),
        (compressed(symmetric=False), StoredFormat("compressed-tensors", "packed", 4, 32, True)),
        (compressed(strategy="channel", group_size=None), StoredFormat("compressed-tensors", "packed", 4, 0, False)),
        (
            compressed("int-quantized", activations=TOKEN, num_bits=8, strategy="channel"),
            StoredFormat("compressed-tensors", "plain", 8, 0, False),
        ),
        (
            compressed("naive-quantized", num_bits=8, strategy="tensor"),
            StoredFormat("compressed-tensors", "plain", 8, 0, False, is_per_tensor=True),
        ),
    ],
)
def test_each_known_form_is_read(section: dict[str, Any], expected: StoredFormat, tmp_path: Path) -> None:
    assert read(tmp_path, section) == expected


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"quant_method": "bitsandbytes"}, '`quant_method` is "bitsandbytes"; expected gptq, awq, compressed-tensors'),
        ({"bits": 4}, "`quant_method` is null; expected gptq, awq, compressed-tensors"),
        (gptq(bits=3), "`bits` is 3; expected 4 or 8"),
        (gptq(bits=None), "`bits` is missing"),
        (gptq(group_size=0), "`group_size` is 0; expected a whole number from 1"),
        (gptq(group_size=None), "`group_size` is missing; expected a whole number, or -1 for one group"),
        (gptq(group_size=True), "`group_size` is true; expected a whole number"),
        (gptq(checkpoint_format="marlin"), '`checkpoint_format` is "marlin"; expected gptq or gptq_v2'),
        (gptq(is_marlin_format=True), "`is_marlin_format` is true; expected false"),
        (gptq(dynamic={"-:lm_head": {}}), "`dynamic` is .*settings that differ from layer to layer"),
        (gptq(pack_dtype="int16"), '`pack_dtype` is "int16"; expected int32'),
        (awq(bits=8), "`bits` is 8; expected 4"),
        (awq(version="gemv"), '`version` is "gemv"; expected gemm'),
        (awq(zero_point=False), "`zero_point` is false; expected true"),
        (compressed("float-quantized"), '`format` is "float-quantized"; expected pack-quantized, int-quantized or'),
        (compressed("int-quantized"), "`num_bits` is 4; expected 8 in the format int-quantized"),
        (compressed(type="float"), '`type` is "float"; expected int'),
        (compressed(num_bits=2), "`num_bits` is 2; expected 4 or 8"),
        (compressed(strategy="block"), '`strategy` is "block"; expected group, channel or tensor'),
        (compressed(strategy="tensor", symmetric=False), "`symmetric` is false; expected true with one scale"),
        (compressed(activations=TOKEN | {"type": "float"}), "expected activations in int8, or as they are"),
        (compressed(activations=TOKEN | {"dynamic": False}), "`dynamic` is false; expected true"),
        (compressed() | {"kv_cache_scheme": {"num_bits": 8}}, "`kv_cache_scheme` .*a quantised cache is not supported"),
        (compressed() | {"transform_config": {"config_groups": {"u": {}}}}, "`transform_config` .*not supported"),
        (compressed() | {"sparsity_config": {"format": "sparse-24"}}, '`format` is "sparse-24"; expected dense'),
        (compressed() | {"quantization_status": "frozen"}, '`quantization_status` is "frozen"; expected compressed'),
        (compressed() | {"config_groups": {"a": {}, "b": {}}}, r"`config_groups` is \[.*; expected one group"),
        (compressed() | {"config_groups": {"a": {}}}, "`weights` is null; expected how weights are quantised"),
    ],
)
def test_what_would_have_to_be_ignored_is_refused(section: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=message):
        read(tmp_path, section)


@pytest.mark.parametrize("asked", [None, "int8", "int4"])
def test_plain_weights_may_become_codes(asked: str | None, tmp_path: Path) -> None:
    check_request(tmp_path, asked, None)


@pytest.mark.parametrize("asked", [None, "gptq"])
def test_stored_codes_may_be_named(asked: str | None, tmp_path: Path) -> None:
    check_request(tmp_path, asked, read(tmp_path, gptq()))


@pytest.mark.parametrize(
    ("asked", "section", "message"),
    [
        (
            "int4",
            gptq(),
            r"--quantize: `int4` is for unquantised checkpoints.*already \(gptq\); leave it out or say `gptq",
        ),
        ("awq", gptq(), "--quantize: `awq` is for checkpoints stored so, and .* is quantised as gptq; leave it out"),
        ("awq", None, "--quantize: `awq` .* is not quantised; say `int8` or `int4` to quantise it while it is loaded"),
        ("fp8", None, "--quantize: `fp8` is not one of int8, int4, gptq, awq, compressed-tensors"),
    ],
)
def test_a_request_that_does_not_fit_is_refused(
    asked: str, section: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=message):
        check_request(tmp_path, asked, read(tmp_path, section))
