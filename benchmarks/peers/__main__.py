"""Gyrfalcon beside other engines on CPUs, in one interleaved run: python -m benchmarks.peers

Run in the repository's folder, with gyrfalcon and transformers installed; the other engines' environments are made by
`python -m benchmarks.peers.install`. What is measured is kept under --results: a run that is interrupted, or split by
the filters, goes on where it was. The report is written there as well, and to --output when asked.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import psutil

from benchmarks.checkpoints import SHAPES
from benchmarks.peers import engines, machine, workloads
from benchmarks.peers.engines import HERE, VARIANTS, Places
from benchmarks.peers.measure import Measurement, Plan
from benchmarks.peers.report import render
from benchmarks.peers.results import Results


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(dict.fromkeys(variant.engine for variant in VARIANTS))
    parser.add_argument("--engines", nargs="+", default=[], metavar="NAME", help=f"{names}; or NAME/PRECISION")
    parser.add_argument("--workloads", nargs="+", default=[], metavar="NAME", help="see --list")
    parser.add_argument("--checkpoints", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--environments", type=Path, default=HERE / ".environments")
    parser.add_argument("--models", type=Path, default=HERE / ".models", help="checkpoints and what is made of them")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--output", type=Path, help="also write the report here")
    parser.add_argument("--memory-budget", type=float, metavar="GIB", help="of loaded engines that wait for their turn")
    parser.add_argument("--remove-models", action="store_true", help="delete converted models after their checkpoint")
    parser.add_argument("--retry-failed", action="store_true", help="measure again what failed before")
    parser.add_argument("--quick", action="store_true", help="an eighth of the tokens: does everything run?")
    parser.add_argument("--plan", action="store_true", help="only say what is missing and how long it takes")
    parser.add_argument("--report", action="store_true", help="only write the report of what there is")
    parser.add_argument("--list", action="store_true", help="name the engines and workloads")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.threads < 1:
        parser.error("--rounds and --threads take whole numbers above 0")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    if arguments.list:
        print("engines:", *(variant.name for variant in VARIANTS), sep="\n  ")
        print("workloads:", *(f"{workload.name:14s} {workload.title}" for workload in workloads.WORKLOADS), sep="\n  ")
        return 0
    try:
        chosen = workloads.choose(arguments.workloads)
        plan = Plan(
            shapes=arguments.checkpoints,
            variants=engines.choose(arguments.engines),
            workloads=[workload.shrunk() if arguments.quick else workload for workload in chosen],
            rounds=arguments.rounds,
            threads=arguments.threads,
            budget_bytes=_budget(arguments.memory_budget),
            retry_failed=arguments.retry_failed,
            remove_models=arguments.remove_models,
        )
        results = Results(
            arguments.results.resolve(), machine.describe() | {"threads": str(arguments.threads)}, quick=arguments.quick
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    places = Places(arguments.environments.resolve(), arguments.models.resolve())
    # Ends as by Ctrl-C: engines that wait are stopped processes, and only a going one can end by itself.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    measurement = Measurement(plan, places, results, _say)
    if not arguments.report:
        for shape, seconds in measurement.estimate_s().items():
            _say(f"{shape}: about {seconds / 60:.0f} minutes, conversions aside")
    if arguments.plan:
        return 0
    try:
        if not arguments.report:
            measurement.run()
    except KeyboardInterrupt:
        _say("interrupted: the same command goes on from here")
    finally:
        text = render(results)
        for path in filter(None, (results.folder / "report.md", arguments.output)):
            path.write_text(text)
            _say(f"report: {path}")
    return 0


def _budget(gib: float | None) -> int:
    """What waiting engines may hold: by default what leaves half of the free memory for the one that runs."""
    return int(gib * 2**30) if gib is not None else psutil.virtual_memory().available // 2


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
