"""Two replicas are replaced under load, with the manifest's probes, drain and grace: no request is lost."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from gyrfalcon.deploy import objects
from gyrfalcon.testing.server import free_port
from tests.deploy.kubelet import Cluster, Pod
from tools.deploy_files import plan

NUM_CLIENTS = 6
PROMPT = "Return the number of"


class Clients:
    """Clients that ask one after another, each request on a connection of its own, half of them for streams."""

    def __init__(self, cluster: Cluster) -> None:
        self.lost: list[str] = []
        self.served: list[tuple[int, str]] = []  # port and text
        self._cluster = cluster
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(NUM_CLIENTS)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(timeout=60)

    def _ask(self, number: int) -> None:
        for turn in count(number):
            if self._ended.is_set():
                return
            port = self._cluster.choose()
            try:
                self.served.append((port, _generate(port, turn)))
            except Exception as error:
                self.lost.append(f"{time.monotonic():.1f} s, port {port}: {type(error).__name__}: {error}")
            time.sleep(0.1)


def _generate(port: int, turn: int) -> str:
    """The text of one answer. Long ones are among them, so that some run whenever a pod is told to end."""
    streams = turn % 2 == 0
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 200 if turn % 4 < 2 else 10}}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        path = "/generate_stream" if streams else "/generate"
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
    finally:
        connection.close()
    assert response.status == 200, text
    if not streams:
        return str(json.loads(text)["generated_text"])
    last: dict[str, Any] = json.loads([line for line in text.splitlines() if line.startswith(b"data:")][-1][5:])
    return str(last["generated_text"])


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    def make_pod(name: str) -> Pod:
        template = objects.deployment(plan("eyas", port=free_port()))["spec"]["template"]
        return Pod(name, template, tmp_path / f"{name}.log")

    made = Cluster(make_pod)
    yield made
    made.close()


@pytest.mark.timeout(240)
def test_a_rolling_update_loses_no_request(cluster: Cluster) -> None:
    cluster.start(replicas=2)
    clients = Clients(cluster)
    try:
        cluster.roll()
        time.sleep(1)
    finally:
        clients.end()
    assert clients.lost == []
    assert {port for port, _ in clients.served} == {pod.port for pod in cluster.pods}
    assert len({text for _, text in clients.served}) <= 2, "the same request gives the same text on every replica"
    assert cluster.fewest_ready >= 2
    old = cluster.pods[:2]
    assert [pod.process.returncode for pod in old] == [0, 0]
    assert not any(pod.was_killed or pod.restarts_asked for pod in cluster.pods)
