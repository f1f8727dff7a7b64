"""What the figures were measured on, and how fast its memory is."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import psutil

FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16")
_SOURCE = Path(__file__).with_name("bandwidth.c")


def describe() -> dict[str, str]:
    """The processor, its features that matter here, cores, memory and system."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", "").split()
    return {
        "processor": facts.get("model name", platform.processor()),
        "family/model/stepping": "/".join(facts.get(key, "?") for key in ("cpu family", "model", "stepping")),
        "features": " ".join(name for name in FEATURES if name in flags),
        "cores": str(len(os.sched_getaffinity(0))),
        "cache": facts.get("cache size", "?"),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "virtual": "yes" if "hypervisor" in flags else "no",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def read_bandwidth(threads: int) -> float:
    """Bytes a second that `threads` threads read from memory together, the best of some passes."""
    output = subprocess.run([str(_probe()), str(threads)], stdout=subprocess.PIPE, text=True, check=True).stdout
    return 1e9 * float(output)


@functools.cache
def _probe() -> Path:
    """The compiled probe. Raises RuntimeError without a C compiler."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("the memory bandwidth is measured by a C program, and no compiler was found: set CC")
    program = Path(tempfile.mkdtemp(prefix="bandwidth-")) / "bandwidth"
    options = ["-O3", "-march=native", "-mprefer-vector-width=512", "-pthread"]
    subprocess.run([compiler, *options, str(_SOURCE), "-o", str(program)], check=True)
    return program


def warm_page_cache(files: list[Path]) -> None:
    """Read files once, so that what reads them next finds them in memory."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def peak_memory(pid: int) -> int:
    """Sum of the largest resident sizes of a process and all that it started; a page they share counts for each."""
    return sum(_field(process.pid, "VmHWM") for process in _tree(pid))


def memory(pid: int) -> int:
    """Sum of the resident sizes now."""
    return sum(_field(process.pid, "VmRSS") for process in _tree(pid))


def _tree(pid: int) -> list[psutil.Process]:
    try:
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _field(pid: int, name: str) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return 0
