"""`gyrfalcon fit`: sizes for a load and what fits, for people and as JSON, without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gyrfalcon.cli.main import app
from gyrfalcon.errors import GyrfalconError
from gyrfalcon.presets import bundled_folder


def fit(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["fit", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def fit_json(*arguments: str) -> Any:
    return json.loads(fit(*arguments, "--json"))


def test_a_preset_is_planned_for_every_known_device() -> None:
    found = fit_json("falcon-40b-instruct", "--context", "2048", "--concurrency", "16")
    assert (found["weight_bytes"], found["kv_bytes_per_token"]) == (82_606_587_904, 122_880)
    assert found["total_bytes"] == sum(found[f"{part}_bytes"] for part in ("weight", "cache", "activation", "runtime"))
    devices = {each["name"]: each for each in found["devices"]}
    assert not devices["A100 or H100, 80 GB"]["fits"]
    assert devices["A100 or H100, 80 GB"]["devices_needed"] == 2
    assert devices["H200, 141 GB"]["fits"]
    assert devices["H200, 141 GB"]["largest_batch"] > 200


def test_the_table_says_the_same() -> None:
    text = fit("falcon-7b", "--device-memory", "16GiB")
    lines = {line.split("  ")[0]: line for line in text.splitlines() if line}
    assert "12.89 GiB in bfloat16" in lines["weights"]
    assert "8.00 KiB a token" in lines["KV cache"]
    assert lines["16.00 GiB (16GiB)"].split()[3] == "yes"
    assert "This version runs a model on one device" not in text
    assert "This version runs a model on one device" in fit("falcon-40b", "--device-memory", "80GiB")


def test_more_context_more_sequences_and_wider_numbers_take_more() -> None:
    small = fit_json("falcon3-1b-instruct", "--context", "1024", "--concurrency", "1")
    assert (
        small["cache_bytes"] < fit_json("falcon3-1b-instruct", "--context", "4096", "--concurrency", "1")["cache_bytes"]
    )
    assert (
        small["cache_bytes"] < fit_json("falcon3-1b-instruct", "--context", "1024", "--concurrency", "9")["cache_bytes"]
    )
    wide = fit_json("falcon3-1b-instruct", "--context", "1024", "--concurrency", "1", "--dtype", "float32")
    assert (wide["weight_bytes"], wide["cache_bytes"]) == (2 * small["weight_bytes"], 2 * small["cache_bytes"])


def test_codes_are_planned_for_this_machines_processor() -> None:
    found = fit_json("falcon-7b-instruct", "--quantize", "int4")
    assert (found["device"], found["quantize"]) == ("cpu", "int4")
    assert found["weight_bytes"] < 4.5e9
    (machine,) = found["devices"]
    assert machine["name"] == "this machine"


def test_a_folder_is_planned_from_its_configuration_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((bundled_folder() / "config.json").read_bytes())
    assert fit_json(str(tmp_path), "--device", "cpu")["parameters"] == fit_json("eyas", "--device", "cpu")["parameters"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("falcon-7b", "--context", "4096"), "--context: 4096 exceeds the 2048 tokens"),
        (("falcon-7b", "--dtype", "int3"), "--dtype: `int3` is not one of auto, float32"),
        (("falcon-7b", "--quantize", "int2"), "--quantize: `int2` is not one of int8, int4"),
        (("falcon-7b", "--quantize", "int8", "--device", "cuda"), "--quantize: `int8` weights are served on CPU only"),
        (("falcon-7b", "--device", "tpu"), "--device: `tpu` is not one of cpu, cuda"),
        (("falcon-7b", "--device-memory", "much"), "--device-memory: `much` is not a size in bytes"),
        (("falcon-9b",), "neither a folder nor a preset nor a Hub id"),
    ],
)
def test_what_cannot_be_planned_is_named(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(GyrfalconError, match=message.replace("(", r"\(")):
        fit(*arguments)
