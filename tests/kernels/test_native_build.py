"""The kernels' library as it is built: there where it can be, fit for any processor, and without forbidden accesses."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from gyrfalcon.kernels.cpu.library import available_kinds, load

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "tools" / "build_native.py"
HAS_COMPILER = any(map(shutil.which, ("c++", "g++", "clang++"))) and platform.machine() == "x86_64"

needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler, or this is not x86-64")


def build_script() -> ModuleType:
    specification = importlib.util.spec_from_file_location("build_native", BUILD)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["build_native"] = module
    specification.loader.exec_module(module)
    return module


@needs_compiler
def test_a_machine_with_a_compiler_has_the_kernels() -> None:
    """Or every other test of them would be skipped in silence."""
    library = load()
    assert library is not None, "run `make native`"
    states = {kind: library.gyrfalcon_kernels_availability(kind.encode()) for kind in ("avx2", "avx512", "amx")}
    assert set(states.values()) <= {1, 2}, "built, whether it runs here or not"
    flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split()
    assert ("avx2" in available_kinds()) == ({"avx2", "fma", "f16c"} <= set(flags))
    assert library.gyrfalcon_kernels_availability(b"sse9") == -1


@needs_compiler
@pytest.mark.skipif(not shutil.which("nm"), reason="there is no nm")
def test_no_code_of_one_kind_can_be_linked_into_another() -> None:
    """Each kind's functions are in a namespace of its own, and none runs before the processor was asked."""
    native = build_script()
    native.build()
    units = native._units(native._compiler(), sanitize=False)
    version = native._run([*native._compiler(), "--version"])
    objects = {unit.source.stem: unit.object_file(version) for unit in units}
    for kind in native.KINDS:
        made = objects[f"kernels_{kind}"]
        listed = subprocess.run(["nm", "-C", "--defined-only", made], capture_output=True, text=True, check=True)
        shared = [line for line in listed.stdout.splitlines() if line.split()[1] in "WVuw"]
        assert [line for line in shared if f"gyrfalcon::{kind}::" not in line] == []
        sections = subprocess.run(["readelf", "-SW", made], capture_output=True, text=True, check=True).stdout
        assert ".init_array" not in sections
        assert ".ctors" not in sections


@needs_compiler
@pytest.mark.skipif(not shutil.which("nm"), reason="there is no nm")
def test_the_library_shows_its_own_functions_alone() -> None:
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", build_script().LIBRARY], capture_output=True, text=True, check=True
    )
    names = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert names
    assert [name for name in names if not name.startswith("gyrfalcon_")] == []


OVERRUN = """
import ctypes
from gyrfalcon.kernels.cpu.library import load
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
print(load().gyrfalcon_checksum(ctypes.c_void_p(libc.malloc(64)), ctypes.c_size_t(65)))
"""


@needs_compiler
@pytest.mark.timeout(570)
def test_under_sanitizers_the_kernels_keep_to_their_memory() -> None:
    """A short form of `make sanitize`: every storage, kind of row and form of attention once."""
    try:
        build_script().sanitized_environment()
    except build_script().NotPossible as reason:
        pytest.skip(str(reason))
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, BUILD, "--sanitize", sys.executable]

    overrun = subprocess.run([*command, "-c", OVERRUN], capture_output=True, text=True, env=environment, check=False)
    assert overrun.returncode != 0
    assert "heap-buffer-overflow" in overrun.stderr, overrun.stderr

    chosen = "random_shapes or follow or codes_of or norms_are or rotated or likeliest"
    tests = [
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        *sorted(ROOT.glob("tests/kernels/test_native_[amr]*")),
    ]
    done = subprocess.run(
        [*command, *tests, "-k", chosen], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
