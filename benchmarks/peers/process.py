"""Engines as processes: started, asked, paused while others are measured, and ended."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.peers import machine
from benchmarks.peers.engines import Places, Variant, end_with_parent, environment_variables

START_LIMIT_S = 600.0
ANSWER_LIMIT_S = 1800.0
END_LIMIT_S = 20.0


class EngineFailed(Exception):
    """The engine ended, or did not answer in time, or there is none."""


class EngineRefused(EngineFailed):
    """The engine said that it cannot do what was asked; it is there for the next request."""


@dataclasses.dataclass(frozen=True, slots=True)
class Size:
    """What an engine has to make room for."""

    threads: int
    max_tokens: int
    max_rows: int
    max_row_tokens: int


class EngineProcess:
    """One adapter with its model loaded. What its libraries print goes to a log."""

    def __init__(self, variant: Variant, shape: str, places: Places, size: Size, log: Path) -> None:
        python = places.python(variant.engine)
        if not python.exists():
            raise EngineFailed(f"no environment: run `python -m benchmarks.peers.install {variant.engine}`")
        assignment = {
            "model": str(places.model(variant, shape)),
            "checkpoint": str(places.checkpoint(shape)),
            "precision": variant.precision,
            **dataclasses.asdict(size),
        }
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        self.start_s = time.perf_counter()
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                [str(python), str(variant.adapter), json.dumps(assignment)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment_variables(variant, places, size.threads),
                start_new_session=True,  # a Ctrl-C reaches it through us, in order
                preexec_fn=end_with_parent,  # noqa: PLW1509  # this process has one thread
            )
        self._unread = b""
        self.facts: dict[str, str] = {}
        self._is_paused = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self) -> None:
        self.facts = self._receive(START_LIMIT_S)["ready"]

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request's answer. Raises EngineFailed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise EngineFailed(f"the engine ended: {self._last_words()}") from None
        return self._receive(ANSWER_LIMIT_S)

    def pause(self) -> None:
        """Stop every thread of it: an idle engine may spin for work, which would be measured with the next one."""
        if not self._is_paused:
            self._signal(signal.SIGSTOP)
            self._is_paused = True

    def go_on(self) -> None:
        if self._is_paused:
            self._signal(signal.SIGCONT)
            self._is_paused = False

    def close(self) -> None:
        self.go_on()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        end_process(self._process)

    def _signal(self, number: signal.Signals) -> None:
        for process in _descendants(self.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _receive(self, limit_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline_s = time.monotonic() + limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, deadline_s - time.monotonic())):
                    raise EngineFailed(f"no answer within {limit_s:.0f} s")
                data = os.read(self._process.stdout.fileno(), 1 << 16)
                if not data:
                    raise EngineFailed(f"the engine ended: {self._last_words()}")
                self._unread += data
        line, self._unread = self._unread.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineRefused(answer["error"])
        return answer

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(timeout=5)
            if status < 0:
                return f"by {signal.Signals(-status).name}"
        return last_line(self._log)


class Pool:
    """Loaded engines. Those that fit the memory stay for the next workload, the others are loaded each time anew."""

    def __init__(self, start: Callable[[Variant], EngineProcess], budget_bytes: int) -> None:
        self._start = start
        self._budget_bytes = budget_bytes
        self._resident: dict[str, EngineProcess] = {}

    @contextlib.contextmanager
    def running(self, variant: Variant) -> Iterator[EngineProcess]:
        """The variant's engine, the only one that runs meanwhile. Raises EngineFailed when it cannot be started."""
        process = self._resident.pop(variant.name, None)
        if process is None:
            process = self._start(variant)
            try:
                process.wait_until_ready()
            except BaseException:
                process.close()
                raise
        process.go_on()
        try:
            yield process
        except BaseException:
            process.close()
            raise
        # Whoever came first stays: engines take turns in the same order, so the one that was used last is used last.
        taken_bytes = sum(machine.memory(other.pid) for other in self._resident.values())
        if taken_bytes + machine.memory(process.pid) <= self._budget_bytes:
            process.pause()
            self._resident[variant.name] = process
        else:
            process.close()

    def make_room(self) -> None:
        """End every loaded engine."""
        while self._resident:
            self._resident.popitem()[1].close()


def end_process(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started: by its own will, then by SIGTERM, then by SIGKILL."""
    family = _descendants(process.pid)
    with contextlib.suppress(subprocess.TimeoutExpired):
        if process.stdin is not None:
            process.wait(timeout=END_LIMIT_S)
    for send in (psutil.Process.terminate, psutil.Process.kill):
        _, alive = psutil.wait_procs(family, timeout=0)
        for one in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                send(one)
        psutil.wait_procs(alive, timeout=END_LIMIT_S)
    process.wait()


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:240] if lines else "it left no word"


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
