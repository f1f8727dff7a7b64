"""Fuzz a target of `targets.py`, or all of them one after the other.

    python -m tests.fuzz body --seconds 600
    python -m tests.fuzz all --driver hypothesis
    python -m tests.fuzz header --replay FILE

atheris follows which code an input reaches and goes on from those that reach something new; hypothesis, which needs
nothing to be installed, changes known inputs at random. What breaks a promise is written to the folder of --findings.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

NAMES = ("body", "header", "stop", "detokenizer", "event")
# libFuzzer's: for an input, by the clock on the wall, which other work on the machine counts for; and for the process.
MOST_SECONDS, MOST_MEBIBYTES, MOST_BYTES = 60, 4096, 4096


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=[*NAMES, "all"])
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--driver", choices=["atheris", "hypothesis"], help="atheris where it is installed")
    parser.add_argument("--findings", type=Path, default=Path("build/fuzz"), help="folder")
    parser.add_argument("--replay", type=Path, help="run the target on this file instead")
    arguments = parser.parse_args()
    driver = arguments.driver or ("atheris" if importlib.util.find_spec("atheris") else "hypothesis")
    if arguments.target == "all":
        ended = [_run_in_a_process(name, arguments.seconds, driver, arguments.findings) for name in NAMES]
        return int(any(ended))
    if arguments.replay is not None:
        from tests.fuzz.targets import TARGETS

        TARGETS[arguments.target].run(arguments.replay.read_bytes())
        return 0
    arguments.findings.mkdir(parents=True, exist_ok=True)
    sys.stderr.write(f"{arguments.target}: {arguments.seconds} s with {driver}\n")
    run = _run_atheris if driver == "atheris" else _run_hypothesis
    return run(arguments.target, arguments.seconds, arguments.findings)


def _run_in_a_process(name: str, seconds: int, driver: str, findings: Path) -> int:
    options = ["--seconds", str(seconds), "--driver", driver, "--findings", str(findings)]
    return subprocess.run([sys.executable, "-m", "tests.fuzz", name, *options], check=False).returncode


def _run_atheris(name: str, seconds: int, findings: Path) -> int:
    """Does not return: libFuzzer ends the process, with a status other than 0 where it has found something."""
    import atheris

    with atheris.instrument_imports(include=["gyrfalcon"]):
        from tests.fuzz.targets import TARGETS

    target = TARGETS[name]
    # Kept, so that the next run goes on from what this one has reached.
    corpus, words = findings / "corpus" / name, findings / f"{name}.dict"
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds():
        (corpus / hashlib.sha1(seed, usedforsecurity=False).hexdigest()).write_bytes(seed)
    words.write_text("# What is worth putting in.\n" + "".join(f'"{_escaped(token)}"\n' for token in target.tokens))
    options = [
        f"-max_total_time={seconds}",
        f"-timeout={MOST_SECONDS}",
        f"-rss_limit_mb={MOST_MEBIBYTES}",
        f"-max_len={MOST_BYTES}",
        f"-artifact_prefix={findings}/{name}-",
        "-print_final_stats=1",
        *([f"-dict={words}"] if target.tokens else []),
        str(corpus),
    ]
    atheris.Setup([sys.argv[0], *options], target.run)
    atheris.Fuzz()
    return 0


def _escaped(token: bytes) -> str:
    return "".join(f"\\x{byte:02X}" for byte in token)


def _run_hypothesis(name: str, seconds: int, findings: Path) -> int:
    from hypothesis import HealthCheck, Phase, given, seed, settings

    from tests.fuzz.strategies import inputs
    from tests.fuzz.targets import TARGETS

    target = TARGETS[name]
    deadline, num_inputs, newest = time.monotonic() + seconds, 0, b""

    @settings(
        max_examples=1000,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(data=inputs(target))
    def run(data: bytes) -> None:
        nonlocal num_inputs, newest
        if time.monotonic() < deadline:
            num_inputs += 1
            try:
                target.run(data)
            except BaseException:
                newest = data
                raise

    for number in count():
        if time.monotonic() >= deadline:
            break
        try:
            seed(number)(run)()
        except BaseException:
            (findings / f"{name}-found").write_bytes(newest)
            raise
    sys.stderr.write(f"{name}: {num_inputs} inputs\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
