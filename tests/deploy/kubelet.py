"""A kubelet, a Deployment's controller and a Service, as small as they can be, over processes of this machine.

Every number (periods, thresholds, seconds of grace) is the manifest's own.
"""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What it takes until all nodes have heard that a pod is ready, or is no more.
ENDPOINTS_LAG_S = 2.0


@dataclass(frozen=True)
class Probe:
    """An httpGet probe, with the API's defaults for what it leaves out."""

    path: str
    period_s: float
    timeout_s: float
    failures: int
    successes: int

    @classmethod
    def of(cls, described: dict[str, Any]) -> Probe:
        assert described["httpGet"]["port"] == "http"
        return cls(
            path=described["httpGet"]["path"],
            period_s=described.get("periodSeconds", 10),
            timeout_s=described.get("timeoutSeconds", 1),
            failures=described.get("failureThreshold", 3),
            successes=described.get("successThreshold", 1),
        )

    def ask(self, port: int) -> bool:
        """Whether the answer's status is from 200 to 399."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=self.timeout_s)
        try:
            connection.request("GET", self.path)
            return 200 <= connection.getresponse().status < 400
        except OSError:
            return False
        finally:
            connection.close()


class Pod:
    """One container, probed as its manifest says until it is told to end."""

    def __init__(self, name: str, template: dict[str, Any], log: Path) -> None:
        (container,) = template["spec"]["containers"]
        self.name = name
        self.port = container["ports"][0]["containerPort"]
        self.is_ready = False
        self.is_terminating = False
        self.restarts_asked = 0  # a real kubelet restarts a container that is not alive; here it is a failure
        self.was_killed = False
        self.ended_after_s = 0.0
        self.log = log
        self._grace_s = template["spec"]["terminationGracePeriodSeconds"]
        self._pre_stop = container["lifecycle"]["preStop"]["exec"]["command"]
        self._probes = {name: Probe.of(container[f"{name}Probe"]) for name in ("startup", "readiness", "liveness")}
        environ = os.environ | {"OMP_NUM_THREADS": "1"}
        environ |= {each["name"]: each["value"] for each in container["env"] if each["name"] != "HOME"}
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gyrfalcon", *container["args"]],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environ,
            )
        self._probing = threading.Thread(target=self._probe, daemon=True)
        self._probing.start()

    def _probe(self) -> None:
        if not self._until(self._probes["startup"], lambda success: success):
            self.restarts_asked += 1
            return
        threading.Thread(target=self._watch_life, daemon=True).start()

        def heed(success: bool) -> bool:
            self.is_ready = success
            return False

        while self._until(self._probes["readiness"], heed) is False and not self._is_over:
            self.is_ready = False

    def _watch_life(self) -> None:
        if not self._until(self._probes["liveness"], lambda success: False) and not self._is_over:
            self.restarts_asked += 1

    @property
    def _is_over(self) -> bool:
        return self.process.poll() is not None or (self.is_terminating and not self.is_ready)

    def _until(self, probe: Probe, is_enough: Callable[[bool], bool]) -> bool:
        """Probe until that is enough (true), or failed too often in a row or the process is over (false)."""
        failed = 0
        while self.process.poll() is None:
            succeeded = probe.ask(self.port)
            failed = 0 if succeeded else failed + 1
            if succeeded and is_enough(True):
                return True
            if failed >= probe.failures:
                return False
            time.sleep(probe.period_s)
        return False

    def terminate(self) -> None:
        """As the kubelet does: preStop, SIGTERM, and after the grace period, which preStop is part of, SIGKILL."""
        began = time.monotonic()
        self.is_terminating = True
        subprocess.run(self._pre_stop, check=True, timeout=self._grace_s)
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=self._grace_s - (time.monotonic() - began))
        except subprocess.TimeoutExpired:
            self.was_killed = True
            self.process.kill()
            self.process.wait()
        self.ended_after_s = time.monotonic() - began


class Cluster:
    """Pods behind a Service that hears of changes late. make_pod: the next pod of a revision."""

    def __init__(self, make_pod: Callable[[str], Pod]) -> None:
        self._make_pod = make_pod
        self.pods: list[Pod] = []
        self.fewest_ready = 1 << 30
        self._endpoints: list[int] = []
        self._turn = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._is_serving = False

    def start(self, replicas: int) -> None:
        self.pods = [self._make_pod(f"old-{index}") for index in range(replicas)]
        threading.Thread(target=self._tell_endpoints, daemon=True).start()
        self._await(lambda: len(self._endpoints) == replicas)
        self._is_serving = True

    def roll(self) -> None:
        """Replace every pod: one more than wanted at a time, never one less (maxSurge 1, maxUnavailable 0)."""
        ending = []
        for index, old in enumerate([pod for pod in self.pods if not pod.is_terminating]):
            new = self._make_pod(f"new-{index}")
            self.pods.append(new)
            self._await(lambda new=new: new.is_ready)  # type: ignore[misc]
            thread = threading.Thread(target=old.terminate)
            thread.start()
            ending.append(thread)
        for thread in ending:
            thread.join()

    def choose(self) -> int:
        """The port of the pod that the next connection goes to."""
        with self._lock:
            self._turn += 1
            return self._endpoints[self._turn % len(self._endpoints)]

    def close(self) -> None:
        self._ended.set()
        for pod in self.pods:
            if pod.process.poll() is None:
                pod.process.kill()
                pod.process.wait()

    def _tell_endpoints(self) -> None:
        told: list[tuple[float, list[int]]] = []
        while not self._ended.wait(0.1):
            ready = [pod.port for pod in self.pods if pod.is_ready and not pod.is_terminating]
            told.append((time.monotonic(), ready))
            while told and time.monotonic() - told[0][0] >= ENDPOINTS_LAG_S:
                _, ports = told.pop(0)
                with self._lock:
                    self._endpoints = ports or self._endpoints
            if self._is_serving:
                self.fewest_ready = min(self.fewest_ready, len(ready))

    def _await(self, condition: Callable[[], bool], timeout_s: float = 90.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            for pod in self.pods:
                if pod.process.poll() is not None and not pod.is_terminating:
                    raise RuntimeError(f"{pod.name} ended with status {pod.process.returncode}:\n{pod.log.read_text()}")
            if time.monotonic() > deadline:
                raise TimeoutError("\n".join(f"{pod.name}:\n{pod.log.read_text()}" for pod in self.pods))
            time.sleep(0.05)
