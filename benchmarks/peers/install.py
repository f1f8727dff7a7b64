"""Make the environments of the other engines: python -m benchmarks.peers.install [NAME ...] [--environments DIR]

Each engine has an environment of its own, because their dependencies exclude each other. It holds exactly what
requirements/NAME.txt lists, installed without looking at dependencies: what an engine names but never needs here (image
and sound libraries, whose builds would have to fit torch's) stays out. Transformers runs where gyrfalcon does. Nothing
is installed twice: a stamp says what an environment was made from.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import time
import venv
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.peers.engines import HERE

STAMP = ".made-from"


@dataclass(frozen=True, slots=True)
class Environment:
    """An engine's environment. requirements: its list, where another engine's is meant. variables: for its build."""

    name: str
    requirements: str = ""
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def list_file(self) -> Path:
        return HERE / "requirements" / f"{self.requirements or self.name}.txt"

    def made_from(self) -> str:
        """A digest of all that the environment depends on."""
        said = [self.list_file.read_text(), sys.version, *(f"{k}={v}" for k, v in sorted(self.variables.items()))]
        return hashlib.sha256("\n".join(said).encode()).hexdigest()


# llama.cpp is compiled for this machine. Its tools and its image part are not needed.
_LLAMA = {"CMAKE_ARGS": "-DLLAMA_BUILD_TOOLS=OFF -DMTMD_BUILD=OFF", "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count())}
_NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"

ENVIRONMENTS = (
    Environment("ctranslate2"),
    Environment("openvino"),
    Environment("onnxruntime-genai"),
    Environment("vllm"),
    # gcc 12 takes the stores that fill a tile's configuration for dead, and llama.cpp then ends by SIGSEGV in its first
    # AMX product: without this optimisation it runs.
    Environment("llama.cpp", variables=_LLAMA | {"CXXFLAGS": "-fno-tree-dse -fno-dse"}),
    Environment("llama.cpp-no-amx", "llama.cpp", _LLAMA | {"CFLAGS": _NO_AMX, "CXXFLAGS": _NO_AMX}),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [environment.name for environment in ENVIRONMENTS]
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these: " + ", ".join(names))
    parser.add_argument("--environments", type=Path, default=HERE / ".environments")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds one environment may take")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(names))
    if unknown:
        parser.error(f"no environment is called {', '.join(unknown)}")
    chosen = [one for one in ENVIRONMENTS if not arguments.names or one.name in arguments.names]
    failed = [one.name for one in chosen if not install(one, arguments.environments.resolve(), arguments.limit)]
    if failed:
        print(f"failed: {', '.join(failed)}; the logs in {arguments.environments} say why", file=sys.stderr)
    return 1 if failed else 0


def install(environment: Environment, places: Path, limit_s: float) -> bool:
    """Make an environment unless it is there; say whether it is now."""
    folder = places / environment.name
    stamp = folder / STAMP
    if stamp.is_file() and stamp.read_text() == environment.made_from():
        print(f"{environment.name}: ready")
        return True
    start_s = time.monotonic()
    venv.create(folder, clear=True, with_pip=False, symlinks=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(folder), "install"]
    command += ["--no-deps", "--no-compile", "--requirement", str(environment.list_file)]
    if environment.variables:
        command += ["--no-cache-dir"]  # a wheel built with other variables would be taken from there
    with (places / f"{environment.name}.log").open("w") as log:
        try:
            ended = subprocess.run(
                command,
                env=os.environ | environment.variables,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            print(f"{environment.name}: not installed within {limit_s:.0f} s", file=sys.stderr)
            return False
    if ended.returncode != 0:
        return False
    stamp.write_text(environment.made_from())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    print(f"{environment.name}: installed in {time.monotonic() - start_s:.0f} s, {size / 1e6:.0f} MB")
    return True


if __name__ == "__main__":
    sys.exit(main())
