"""`gyrfalcon models`: every preset in the documented form, as a table and as JSON."""

from __future__ import annotations

import json

import pytest

from gyrfalcon.cli.models import models
from gyrfalcon.presets import catalogue


def test_the_table_shows_each_preset_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    models()
    text = capsys.readouterr().out
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    for heading in ("Model name", "Model source", "Sample workspace", "Kubernetes workload", "Distributed inference"):
        assert heading in text.splitlines()[1]
    assert {preset.name for preset in catalogue()} <= set(lines)
    seven = lines["falcon-7b"]
    for part in (
        "tiiuae/falcon-7b",
        "deploy/kaito/falcon-7b.yaml",
        "Deployment",
        "no",
        "6.9 B",
        "25.8 GiB",
        "12.9 GiB",
        "7.0 GiB",
        "4.1 GiB",
        "Apache-2.0",
    ):
        assert part in seven
    assert "this package" in lines["eyas"]


def test_json_holds_the_same_in_exact_figures(capsys: pytest.CaptureFixture[str]) -> None:
    models(as_json=True)
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == [preset.name for preset in catalogue()]
    forty = rows["falcon-40b"]
    assert (forty["weight_bytes"]["float32"], forty["weight_bytes"]["bfloat16"]) == (165_213_175_808, 82_606_587_904)
    assert forty["weight_bytes"]["int4"] < forty["weight_bytes"]["int8"] < 45e9
    assert (forty["source"], forty["workspace"]) == ("tiiuae/falcon-40b", "deploy/kaito/falcon-40b.yaml")
    assert (forty["workload"], forty["distributed"]) == ("Deployment", False)
    assert rows["eyas"]["source"] is None
    assert rows["eyas"]["sample"] == "gyrfalcon serve eyas"
