"""`gyrfalcon models`: every preset with its figures, as a table and as JSON."""

from __future__ import annotations

import json

import pytest

from gyrfalcon.cli.models import models
from gyrfalcon.presets import catalogue


def test_the_table_shows_each_preset_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    models()
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert {preset.name for preset in catalogue()} <= set(lines)
    seven = lines["falcon-7b"]
    for part in (
        "tiiuae/falcon-7b",
        "6.9 B",
        "25.8 GiB",
        "12.9 GiB",
        "6.4 GiB",
        "3.2 GiB",
        "Deployment",
        "no",
        "Apache-2.0",
    ):
        assert part in seven
    assert "this package" in lines["eyas"]


def test_json_holds_the_same_in_exact_figures(capsys: pytest.CaptureFixture[str]) -> None:
    models(as_json=True)
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == [preset.name for preset in catalogue()]
    assert rows["falcon-40b"]["weight_bytes"] == {
        "float32": 165_213_175_808,
        "bfloat16": 82_606_587_904,
        "float16": 82_606_587_904,
        "int8": 41_303_293_952,
        "int4": 20_651_646_976,
    }
    assert rows["falcon-40b"]["source"] == "tiiuae/falcon-40b"
    assert (rows["falcon-40b"]["workload"], rows["falcon-40b"]["distributed"]) == ("Deployment", False)
    assert rows["eyas"]["source"] is None
    assert rows["eyas"]["sample"] == "gyrfalcon serve eyas"
