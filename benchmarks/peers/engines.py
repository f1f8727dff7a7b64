"""Who takes part: every engine in every precision it is measured in, and how each reads the checkpoints."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent

Weights = Literal["float32", "bf16", "int8", "int4"]

# What a step reads at least for a weight. Four bits come with a half-precision scale for every 32 weights.
WEIGHT_BYTES: dict[Weights, float] = {"float32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5 + 2 / 32}


@dataclass(frozen=True, slots=True)
class Variant:
    """One engine in one precision.

    engine: also the name of its environment. family: the engine whose adapter and models it uses, where that has
    another name. weights: what the precision comes down to, for the limit and for comparing like with like.
    converter: a script of convert/ that takes (checkpoint, output, precision); None where the engine reads the
    checkpoint itself. suffix: of what the converter makes.
    """

    engine: str
    precision: str
    weights: Weights
    converter: str | None = None
    suffix: str = ""
    family: str = ""

    @property
    def name(self) -> str:
        return f"{self.engine}/{self.precision}"

    @property
    def base(self) -> str:
        return self.family or self.engine

    @property
    def adapter(self) -> Path:
        return HERE / "adapters" / f"{self.base.replace('.', '_').replace('-', '_')}_adapter.py"

    @property
    def is_ours(self) -> bool:
        return self.engine == "gyrfalcon"


VARIANTS = (
    Variant("gyrfalcon", "bf16", "bf16"),
    Variant("gyrfalcon", "int8", "int8"),
    Variant("gyrfalcon", "int4", "int4"),
    Variant("gyrfalcon", "float32", "float32"),
    Variant("transformers", "bf16", "bf16"),
    Variant("vllm", "bf16", "bf16"),
    Variant("llama.cpp", "bf16", "bf16", "to_gguf.py", ".gguf"),
    Variant("llama.cpp", "q8_0", "int8", "to_gguf.py", ".gguf"),
    Variant("llama.cpp", "q4_0", "int4", "to_gguf.py", ".gguf"),
    # The same without its AMX kernels, which are not its fastest at every number of rows.
    Variant("llama.cpp-no-amx", "q8_0", "int8", "to_gguf.py", ".gguf", family="llama.cpp"),
    Variant("llama.cpp-no-amx", "q4_0", "int4", "to_gguf.py", ".gguf", family="llama.cpp"),
    Variant("openvino", "bf16", "bf16", "to_openvino.py"),
    Variant("openvino", "int8", "int8", "to_openvino.py"),
    Variant("openvino", "int4", "int4", "to_openvino.py"),
    Variant("ctranslate2", "int8", "int8", "to_ctranslate2.py"),
    Variant("onnxruntime-genai", "int8", "int8", "to_onnx.py"),
    Variant("onnxruntime-genai", "int4", "int4", "to_onnx.py"),
)

# Engines that run in the environment the comparison itself is started in.
AT_HOME = ("gyrfalcon", "transformers")


def choose(names: list[str]) -> list[Variant]:
    """The variants called so: an engine's name means all of its precisions. Raises ValueError on an unknown name."""
    known = {variant.name for variant in VARIANTS} | {variant.engine for variant in VARIANTS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no engine is called {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    return [variant for variant in VARIANTS if not names or variant.name in names or variant.engine in names]


def own_threads(threads: int) -> int | None:
    """The setting for our engine: its own choice where all cores may be used, as its users have it."""
    return None if threads == len(os.sched_getaffinity(0)) else threads


@dataclass(frozen=True, slots=True)
class Places:
    """Where environments and models are."""

    environments: Path
    models: Path

    def python(self, engine: str) -> Path:
        """The interpreter of an engine's environment; it may not be there."""
        return Path(sys.executable) if engine in AT_HOME else self.environments / engine / "bin" / "python"

    def checkpoint(self, shape: str) -> Path:
        return self.models / "checkpoints" / shape

    def model(self, variant: Variant, shape: str) -> Path:
        """The checkpoint as the variant reads it."""
        if variant.converter is None:
            return self.checkpoint(shape)
        return self.models / variant.base / f"{shape}-{variant.precision}{variant.suffix}"


def environment_variables(variant: Variant, places: Places, threads: int) -> dict[str, str]:
    """The variables an engine's process starts with."""
    variables = dict(os.environ)
    if variant.engine != "gyrfalcon":  # which is told by its own setting, where it should not choose itself
        variables["OMP_NUM_THREADS"] = str(threads)
    variables["HF_HUB_OFFLINE"] = "1"
    if variant.engine in AT_HOME:
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY / "src"), os.environ.get("PYTHONPATH")]))
    else:
        variables.pop("PYTHONPATH", None)
    # vLLM's own advice for CPUs; the library comes with the package it names as needed.
    openmp = places.environments / "vllm" / "lib" / "libiomp5.so"
    if variant.engine == "vllm" and openmp.is_file():
        variables["LD_PRELOAD"] = str(openmp)
    return variables


def convert(variant: Variant, shape: str, places: Places) -> None:
    """Make the variant's form of a checkpoint unless it is there. Raises RuntimeError with the converter's end."""
    output = places.model(variant, shape)
    if variant.converter is None or output.exists():
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    # Under another name until it is complete, so that an interrupted run leaves nothing that looks finished.
    partial = output.with_name(f"partial-{output.name}")
    script = HERE / "convert" / variant.converter
    command = [places.python(variant.engine), script, places.checkpoint(shape), partial, variant.precision]
    ended = subprocess.run(
        [str(part) for part in command],
        preexec_fn=end_with_parent,
        env=environment_variables(variant, places, threads=os.cpu_count() or 1),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if ended.returncode != 0 or not partial.exists():
        _remove(partial)
        lines = [line for line in ended.stdout.splitlines() if line.strip()] or ["no output"]
        raise RuntimeError(f"conversion ended with status {ended.returncode}: {lines[-1].strip()[:240]}")
    partial.rename(output)


def end_with_parent() -> None:
    """In a child: have the kernel end it when the comparison ends in whatever way. Linux only, as the comparison is."""
    set_parent_death_signal = 1
    _LIBC.prctl(set_parent_death_signal, signal.SIGKILL)


_LIBC = ctypes.CDLL(None)


def remove_models(shape: str, places: Places) -> None:
    """Delete what was converted from a checkpoint; the checkpoint stays."""
    for variant in VARIANTS:
        if variant.converter is not None:
            _remove(places.model(variant, shape))


def model_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
