from __future__ import annotations

import re

import pytest
from starlette.testclient import TestClient

from gyrfalcon.http import machine
from gyrfalcon.http.machine import parse_gpus, wants_machine

PROMETHEUS = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1"


@pytest.mark.parametrize(
    ("accept", "wants"),
    [
        ("application/json", True),
        ("Application/JSON;q=0.9, */*", True),
        ("*/*", False),
        (None, False),
        ("", False),
        ("text/html", False),
        ("application/json, text/plain", False),
        (PROMETHEUS, False),
    ],
)
def test_the_report_is_what_a_client_of_kaito_asks_for(accept: str | None, wants: bool) -> None:
    assert wants_machine(accept) == wants


def test_the_processor_is_told_of_without_a_gpu(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    answer = client.get("/metrics", headers={"Accept": "application/json"})
    assert answer.headers["content-type"] == "application/json"
    report = answer.json()
    assert list(report) == ["gpu_info", "cpu_info"]
    assert report["gpu_info"] is None
    cpu = report["cpu_info"]
    assert 0 <= cpu["load_percentage"] <= 100
    assert cpu["total_cores"] >= 1
    assert all(re.fullmatch(r"\d+\.\d\d GB", cpu["memory"][name]) for name in ("used", "total"))
    assert cpu["memory"]["total"] != "0.00 GB"


def test_otherwise_metrics_are_prometheus_text(client: TestClient) -> None:
    for accept in ("*/*", PROMETHEUS):
        assert "tgi_request_count 0.0" in client.get("/metrics", headers={"Accept": accept}).text


def test_gpus_are_told_of_in_kaitos_units() -> None:
    table = "0, NVIDIA H200, 25, 55, 1024, 143771\n1, NVIDIA H200, [N/A], 55, 1, 2\nnonsense\n"
    assert parse_gpus(table) == [
        {
            "id": "0",
            "name": "NVIDIA H200",
            "load": "25.00%",
            "temperature": "55.0 C",
            "memory": {"used": "1.00 GB", "total": "140.40 GB"},
        }
    ]


def test_a_gpu_tool_that_fails_is_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/bin/false")
    assert machine.read_machine()["gpu_info"] is None
