"""The compose file: what it mounts exists, what it sets is known, and Prometheus asks where the server answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gyrfalcon.config import OPTIONS

FOLDER = Path(__file__).parents[2] / "deploy" / "compose"
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]


def test_all_that_is_mounted_exists_or_is_a_volume() -> None:
    for service in SERVICES.values():
        for entry in service.get("volumes", []):
            source = entry.split(":")[0]
            assert source in COMPOSE["volumes"] or (FOLDER / source).exists(), source


def test_the_server_can_write_to_its_volume_and_tmp_alone() -> None:
    server = SERVICES["server"]
    assert (server["read_only"], server["cap_drop"]) == (True, ["ALL"])
    assert server["volumes"] == ["weights:/data"]
    assert (FOLDER / server["build"]["context"] / server["build"]["dockerfile"]).is_file()


def test_the_servers_variables_are_ones_it_reads() -> None:
    known = {name for option in OPTIONS for name in option.variables} | {"HF_TOKEN"}
    assert {entry.partition("=")[0] for entry in SERVICES["server"]["environment"]} <= known


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_ports_are_open_on_this_machine_alone_and_images_have_a_version(name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name]["ports"])
    assert not SERVICES[name]["image"].endswith(":latest")
    assert ":" in SERVICES[name]["image"]


def test_prometheus_asks_the_server_and_grafana_asks_prometheus() -> None:
    (job,) = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["server:8080"]}]
    (source,) = yaml.safe_load((FOLDER / "grafana/datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((FOLDER / "grafana/dashboards/gyrfalcon.yaml").read_text())["providers"]
    targets = [entry.split(":")[1] for entry in SERVICES["grafana"]["volumes"]]
    assert provider["options"]["path"] in targets
