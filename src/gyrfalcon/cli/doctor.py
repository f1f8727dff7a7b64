"""`gyrfalcon doctor`: what this machine has, what would be served, and what is in the way."""

from __future__ import annotations

import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path

import psutil

from gyrfalcon import __version__, hub
from gyrfalcon.cli.listener import claim
from gyrfalcon.config import Settings
from gyrfalcon.errors import OperatorError

_GIB = 1024**3
# What speeds up matrix products on a CPU, as Linux spells it.
_CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "sve")


def doctor(settings: Settings) -> None:
    """Say what this machine has, what `serve` would do with the same options, and what is in the way."""
    for name, text in machine_facts(settings):
        print(f"{name:<13} {text}")

    from gyrfalcon.kernels.cpu import library  # with numpy, which the other commands' help can do without

    problems = []
    try:
        print(f"{'kernels':<13} {library.describe()}")
    except OperatorError as error:
        problems.append(error)
    try:
        print(f"{'model':<13} {hub.describe_source(settings.model)}")
    except OperatorError as error:
        problems.append(error)
    try:
        claim(settings.host, settings.port).close()
        print(f"{'address':<13} {settings.host} port {settings.port}, free")
    except OperatorError as error:
        problems.append(error)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        sys.exit(1)


def machine_facts(settings: Settings) -> list[tuple[str, str]]:
    """Versions, processors, memory and cache, each with its name."""
    memory = psutil.virtual_memory()
    return [
        ("gyrfalcon", f"{__version__}, Python {platform.python_version()} on {platform.platform(terse=True)}"),
        *((name, _version(name)) for name in ("torch", "tokenizers", "safetensors", "transformers")),
        ("cpu", f"{psutil.cpu_count(logical=False)} cores, {' '.join(_cpu_features()) or 'no known vector units'}"),
        ("gpu", _gpu()),
        ("memory", f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free"),
        ("cache", _cache(settings)),
    ]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu_features() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return []
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    present = set(line.partition(":")[2].split())
    return [feature for feature in _CPU_FEATURES if feature in present]


def _gpu() -> str:
    version = Path("/proc/driver/nvidia/version")
    if not version.exists():
        return "none found"
    return version.read_text(encoding="utf-8", errors="replace").splitlines()[0].strip()


def _cache(settings: Settings) -> str:
    folder = settings.huggingface_hub_cache or hub.default_cache()
    existing = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    note = ", offline mode is on" if hub.huggingface_is_offline() else ""
    return f"{folder}, {shutil.disk_usage(existing).free / _GIB:.1f} GiB free{note}"
