"""The run: round by round, workload by workload, every engine in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.checkpoints import SHAPES, write_shape
from benchmarks.peers import http_load, machine
from benchmarks.peers.engines import Places, Variant, convert, model_files, remove_models
from benchmarks.peers.process import EngineFailed, EngineProcess, EngineRefused, Pool, Size
from benchmarks.peers.results import BANDWIDTH, Cell, Results
from benchmarks.peers.workloads import Workload

# Between engines: what the last one freed is really free, and the processor's clock has come to rest.
PAUSE_S = 0.5


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be measured, and with what."""

    shapes: list[str]
    variants: list[Variant]
    workloads: list[Workload]
    rounds: int
    threads: int
    budget_bytes: int  # of loaded engines that wait for their turn
    retry_failed: bool
    remove_models: bool


class Measurement:
    """Runs a plan, adding to the results what they do not hold yet."""

    def __init__(self, plan: Plan, places: Places, results: Results, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._places = places
        self._results = results
        self._say = say

    def pending(self, shape: str, workload: Workload, turn: int) -> list[Variant]:
        """Who has still to run a workload in a round; another begins in every round."""
        variants = self._plan.variants
        shift = (turn - 1) % len(variants)
        return [
            variant
            for variant in variants[shift:] + variants[:shift]
            if (workload.kind != "http" or http_load.has_server(variant))
            and not self._results.is_done(
                shape, workload.name, variant.name, turn, retry_failed=self._plan.retry_failed
            )
        ]

    def estimate_s(self) -> dict[str, float]:
        """About how long what is missing takes, by shape; loading included where it was measured before."""
        times: dict[str, float] = {}
        for shape in self._plan.shapes:
            for workload in self._plan.workloads:
                if workload.is_for(shape):
                    for turn in range(1, self._plan.rounds + 1):
                        for variant in self.pending(shape, workload, turn):
                            usual_s = self._results.usual_s(shape, workload.name, variant.name)
                            times[shape] = times.get(shape, 0.0) + (usual_s or workload.usual_s + 6.0)
        return times

    def run(self) -> None:
        for shape in self._plan.shapes:
            workloads = [workload for workload in self._plan.workloads if workload.is_for(shape)]
            if any(
                self.pending(shape, workload, 1 + turn) for workload in workloads for turn in range(self._plan.rounds)
            ):
                self._say(f"{shape}: checkpoint")
                write_shape(self._places.checkpoint(shape), shape)
                self._run_shape(shape, workloads)
            if self._plan.remove_models:
                remove_models(shape, self._places)

    def _run_shape(self, shape: str, workloads: list[Workload]) -> None:
        pool = Pool(lambda variant: self._start(variant, shape, self._size(workloads)), self._plan.budget_bytes)
        try:
            for turn in range(1, self._plan.rounds + 1):
                for workload in workloads:
                    if workload.kind not in ("start", "http"):
                        self._run_pass(shape, workload, turn, pool)
                # Engines that wait would be in the way of those that are started anew.
                starts = [workload for workload in workloads if workload.kind == "start"]
                clients = [workload for workload in workloads if workload.kind == "http"]
                if any(self.pending(shape, workload, turn) for workload in starts + clients):
                    pool.make_room()
                for workload in starts:
                    for variant in self.pending(shape, workload, turn):
                        self._measure(shape, workload, variant, turn, self._start_and_ask)
                self._run_servers(shape, clients, turn)
        finally:
            pool.make_room()

    def _run_pass(self, shape: str, workload: Workload, turn: int, pool: Pool) -> None:
        """One workload of one round, all engines after another, the memory's speed before them."""
        variants = self.pending(shape, workload, turn)
        if variants and workload.kind == "decode":
            value = machine.read_bandwidth(self._plan.threads)
            self._results.add(Cell(shape, workload.name, BANDWIDTH, turn, {"bytes_per_s": value}, None, 0.0, {}))
            self._say(f"{shape} {workload.name} round {turn}: memory {value / 1e9:.1f} GB/s")

        def ask(shape: str, workload: Workload, variant: Variant, turn: int) -> tuple[dict[str, float], dict[str, str]]:
            with pool.running(variant) as process:
                try:
                    vocab_size = SHAPES[shape]["vocab_size"]
                    process.ask(workload.warm_up(vocab_size))
                    answer = process.ask(workload.request(vocab_size, turn))
                    return workload.figures(answer), process.facts
                except EngineRefused as error:
                    refusal = error
            raise refusal

        for variant in variants:
            self._measure(shape, workload, variant, turn, ask)

    def _start_and_ask(
        self, shape: str, workload: Workload, variant: Variant, turn: int
    ) -> tuple[dict[str, float], dict[str, str]]:
        """A process from its start to the first token of one prompt, and the most memory it needs for one request."""
        machine.warm_page_cache(model_files(self._places.model(variant, shape)))
        vocab_size = SHAPES[shape]["vocab_size"]
        request = workload.request(vocab_size, turn)
        process = self._start(variant, shape, Size(self._plan.threads, max(512, workload.total_tokens), 1, 512))
        try:
            process.wait_until_ready()
            process.ask(request | {"new_tokens": 1})
            started_s = time.perf_counter() - process.start_s
            process.ask(workload.request(vocab_size, -1 - turn))
            return {"seconds": started_s, "peak_bytes": float(machine.peak_memory(process.pid))}, process.facts
        finally:
            process.close()

    def _run_servers(self, shape: str, workloads: list[Workload], turn: int) -> None:
        """All numbers of clients of one server before the next server starts."""
        wanted = {variant.name: variant for workload in workloads for variant in self.pending(shape, workload, turn)}
        size = self._size(workloads) if workloads else None
        for variant in wanted.values():
            assert size is not None
            mine = [workload for workload in workloads if variant in self.pending(shape, workload, turn)]
            log = self._log(variant, shape, "server")
            try:
                convert(variant, shape, self._places)
                machine.warm_page_cache(model_files(self._places.model(variant, shape)))
                with http_load.running_server(variant, shape, self._places, size, log) as server:
                    self._run_clients(shape, mine, variant, turn, server)
            except (EngineFailed, RuntimeError, OSError) as error:
                for workload in mine:
                    if not self._results.is_done(shape, workload.name, variant.name, turn, retry_failed=False):
                        self._note(shape, workload, variant, turn, {}, str(error), 0.0, {})

    def _run_clients(
        self, shape: str, workloads: list[Workload], variant: Variant, turn: int, server: http_load.Server
    ) -> None:
        eos = SHAPES[shape]["eos_token_id"]

        def ask(shape: str, workload: Workload, variant: Variant, turn: int) -> tuple[dict[str, float], dict[str, str]]:
            figures = http_load.measure(server, workload, eos, turn)
            return figures | {"peak_bytes": float(machine.peak_memory(server.pid))}, {}

        one = Workload("http-first", "", "http", 1, 32, 1)
        http_load.measure(server, one, eos, turn)
        started_s = time.perf_counter() - server.start_s
        for workload in workloads:
            self._measure(shape, workload, variant, turn, ask, extra={"start_s": started_s})

    def _measure(
        self,
        shape: str,
        workload: Workload,
        variant: Variant,
        turn: int,
        ask: Callable[[str, Workload, Variant, int], tuple[dict[str, float], dict[str, str]]],
        extra: dict[str, float] | None = None,
    ) -> None:
        time.sleep(PAUSE_S)
        start_s = time.perf_counter()
        figures: dict[str, float] = {}
        facts: dict[str, str] = {}
        error: str | None = None
        try:
            convert(variant, shape, self._places)
            start_s = time.perf_counter()  # converting happens once: it is no part of what a round takes
            figures, facts = ask(shape, workload, variant, turn)
        except (EngineFailed, RuntimeError, ValueError, OSError, TimeoutError) as failure:
            error = str(failure) or type(failure).__name__
        wall_s = time.perf_counter() - start_s
        self._note(shape, workload, variant, turn, figures | (extra or {} if figures else {}), error, wall_s, facts)

    def _note(
        self,
        shape: str,
        workload: Workload,
        variant: Variant,
        turn: int,
        figures: dict[str, float],
        error: str | None,
        wall_s: float,
        facts: dict[str, str],
    ) -> None:
        self._results.add(Cell(shape, workload.name, variant.name, turn, figures, error, wall_s, facts))
        said = error or "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self._say(f"{shape} {workload.name} round {turn}: {variant.name}: {said} ({wall_s:.0f} s)")

    def _start(self, variant: Variant, shape: str, size: Size) -> EngineProcess:
        return EngineProcess(variant, shape, self._places, size, self._log(variant, shape, "engine"))

    def _size(self, workloads: list[Workload]) -> Size:
        longest = max(workload.total_tokens for workload in workloads)
        most = max(workloads, key=lambda workload: workload.rows * workload.total_tokens)
        # A little room: servers cut the clients' text into about as many tokens as it is made for.
        return Size(self._plan.threads, longest + 128, max(4, most.rows), most.total_tokens + 128)

    def _log(self, variant: Variant, shape: str, kind: str) -> Path:
        return self._results.folder / "logs" / f"{variant.name.replace('/', '-')}-{shape}-{kind}.log"
