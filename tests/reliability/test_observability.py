"""What operators see: health, the log's line of each request, metrics, and a dashboard that asks for what there is."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from gyrfalcon.engine.interface import EngineState
from gyrfalcon.http.app import create_app
from gyrfalcon.http.drain import Drain
from gyrfalcon.http.settings import HttpSettings
from gyrfalcon.metrics import ABORTS, CUTS, REJECTIONS
from gyrfalcon.testing.engine import FakeEngine
from gyrfalcon.testing.text import text_service
from tests.reliability.house import ask, body_of, status_of

from .conftest import MakeClient, OpenHouse

DASHBOARDS = sorted((Path(__file__).parents[2] / "deploy" / "grafana").glob("*.json"))
# Words of the query language, and labels.
NOT_METRICS = {"histogram_quantile", "label_values"}


@pytest.mark.parametrize(
    ("state", "live", "ready"),
    [
        (EngineState.READY, 200, 200),
        (EngineState.STARTING, 200, 503),
        (EngineState.DEAD, 200, 503),
        (EngineState.STUCK, 503, 503),
    ],
)
def test_live_and_ready_answer_different_questions(
    make_client: MakeClient, state: EngineState, live: int, ready: int
) -> None:
    engine = FakeEngine()
    engine.state = state
    client = make_client(engine)
    assert client.get("/health/live").status_code == live
    assert client.get("/health/ready").status_code == client.get("/ready").status_code == ready
    if ready == 503:
        assert client.get("/ready").json()["error_type"] == "healthcheck"


async def test_a_draining_server_is_not_ready_and_then_takes_nothing_new(house: OpenHouse) -> None:
    engine = FakeEngine(step_s=0.01)
    async with house(engine) as server:
        body = {"inputs": "x", "parameters": {"max_new_tokens": 3}}
        server.drain.announce()
        assert status_of(await ask(server.port, "/health/ready", method="GET")) == 503
        assert status_of(await ask(server.port, "/health", method="GET")) == 200
        assert status_of(await ask(server.port, "/generate", body)) == 200
        server.drain.begin()
        refused = await ask(server.port, "/generate", body)
        assert (status_of(refused), body_of(refused)["error_type"]) == (503, "draining")
        assert b"\r\nretry-after: 5\r\n" in refused
        assert body_of(await ask(server.port, "/chat", {"prompt": "x"})).keys() == {"detail"}
        assert status_of(await ask(server.port, "/metrics", method="GET")) == 200
        assert server.metric("gyrfalcon_rejected_total", cause="draining") == 2


def test_every_cause_has_a_series_from_the_start(make_client: MakeClient) -> None:
    lines = make_client().get("/metrics").text.splitlines()
    for name, causes in (("rejected", REJECTIONS), ("aborts", ABORTS), ("connections_cut", CUTS)):
        for cause in causes:
            assert f'gyrfalcon_{name}_total{{cause="{cause}"}} 0.0' in lines


def test_1_3_ids_are_the_servers_and_each_request_has_one_line(
    make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gyrfalcon.telemetry")
    engine = FakeEngine()
    client = make_client(engine)
    body = {"inputs": "x", "parameters": {"max_new_tokens": 1}}
    for _ in range(2):
        client.post("/generate", json=body, headers={"X-Request-Id": "mine"})
    ids = [request.request_id for request in engine.requests]
    assert len(set(ids)) == 2
    assert "mine" not in ids
    assert [record.request_id for record in caplog.records] == ids  # type: ignore[attr-defined]


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.name)
def test_the_dashboard_asks_for_what_the_server_exports(tokenizer_folder: Path, dashboard: Path) -> None:
    engine = FakeEngine()
    service, metrics = text_service(engine, tokenizer_folder)
    client = TestClient(create_app(service, HttpSettings(), metrics, drain=Drain()))
    client.post("/generate", json={"inputs": "x", "parameters": {"max_new_tokens": 3}})
    exported, labels = _exported(client.get("/metrics").text)
    board = json.loads(dashboard.read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries += [variable["query"] for variable in board["templating"]["list"]]
    asked = set(re.findall(r"\b(?:tgi|gyrfalcon)_\w+", " ".join(queries))) - NOT_METRICS
    assert len(queries) > 20
    assert asked - exported == set()
    grouped = {label for query in queries for label in re.findall(r"by \((\w+)\)", query)}
    assert grouped - labels == set()


def test_there_is_a_dashboard_with_panels_that_do_not_overlap() -> None:
    assert DASHBOARDS
    for path in DASHBOARDS:
        panels = json.loads(path.read_text())["panels"]
        places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
        assert len(set(places)) == len(places)
        assert len({panel["id"] for panel in panels}) == len(panels)


def _exported(text: str) -> tuple[set[str], set[str]]:
    """Names of all series, and of all labels that scraping does not add."""
    names, labels = set[str](), set[str]()
    for line in text.splitlines():
        if not line.startswith("#"):
            name: Any = re.match(r"\w+", line)
            names.add(name[0])
            labels |= set(re.findall(r'(\w+)="', line))
    return names, labels
