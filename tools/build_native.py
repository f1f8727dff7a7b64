"""Build the CPU kernels: csrc/*.cpp becomes src/gyrfalcon/kernels/cpu/libgyrfalcon_cpu.so.

    python tools/build_native.py                        build what has changed since the last time
    python tools/build_native.py --sanitize COMMAND     build a second library with address and undefined-behaviour
                                                        checks in build/native/sanitized, and run COMMAND with it

Needs a C++17 compiler (CXX, or c++, g++ or clang++ on the path) and Python alone. Compiled files are kept in
build/native by the contents of what went into them, so that only what changed is compiled again, whatever the clock
says.
The package's own build calls `build` too (hatch_build.py).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc"
OBJECTS = ROOT / "build" / "native"
LIBRARY = ROOT / "src" / "gyrfalcon" / "kernels" / "cpu" / "libgyrfalcon_cpu.so"
SANITIZED_LIBRARY = OBJECTS / "sanitized" / LIBRARY.name
# Beside the library that is not there: why. The package reads it, since pip shows nothing of what a build prints.
NOTICE = LIBRARY.with_name("not_built.txt")

# No -ffast-math and no contraction: an element's bits are what the source says. Vector types wider than the baseline's
# registers are passed between inlined functions only, hence no warning about how.
FLAGS = [
    *("-std=c++17", "-O3", "-g1", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-pthread"),
    *("-ffp-contract=off", "-Wall", "-Wextra", "-Werror=return-type", "-Wno-psabi"),
]
_SANITIZERS = "-fsanitize=address,undefined"
SANITIZE_FLAGS = [_SANITIZERS, "-O1", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]

# What the files named kernels_<kind>.cpp are compiled for; all others run on any x86-64. In the order in which they are
# linked: where the compiler has left a library's inline function in several of them, the linker keeps the first one,
# which has to be the one that runs everywhere.
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# gcc 12 warns of its own intrinsics, which leave a register undefined on purpose (gcc bug 105593).
_AVX512 = [
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-mavx512vnni",
    *_AVX2,
]
_AMX = [*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"]
KINDS = {"avx2": _AVX2, "avx512": _AVX512, "amx": _AMX}

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


class NotBuilt(Exception):
    """There is no library; the message is one line that says why, `details` what the compiler said."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class NotPossible(NotBuilt):
    """This machine has no compiler, or a processor that the kernels are not written for."""


@dataclass(frozen=True)
class Unit:
    """One file to compile."""

    source: Path
    flags: tuple[str, ...]

    def object_file(self, compiler: str) -> Path:
        """Where its compiled form is kept: named for everything it depends on, besides the system's own headers."""
        digest = hashlib.sha256("\0".join((compiler, *self.flags)).encode())
        for path in _with_includes(self.source):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return OBJECTS / f"{self.source.stem}-{digest.hexdigest()[:20]}.o"


def build(*, sanitize: bool = False) -> Path:
    """Compile and link what has changed; the library's path.

    Raises NotPossible without a compiler and on other processors than x86-64, NotBuilt where compiling fails.
    """
    target = SANITIZED_LIBRARY if sanitize else LIBRARY
    if platform.machine().lower() not in ("x86_64", "amd64") or sys.platform != "linux":
        raise NotPossible(f"they are written for Linux on x86-64, and this is {sys.platform} on {platform.machine()}")
    command = _compiler()
    version = _run([*command, "--version"])
    OBJECTS.mkdir(parents=True, exist_ok=True)
    units = _units(command, sanitize=sanitize)
    objects = [unit.object_file(version) for unit in units]
    # The largest first, so that the last one to end is not also the last to start.
    order = sorted(range(len(units)), key=lambda i: units[i].source.stem.startswith("kernels_"), reverse=True)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(lambda i: _compile(command, units[i], objects[i]), order))
    # Left to the running program where the sanitizers' own functions come from; everything else must be there.
    _link(command, objects, target, [_SANITIZERS] if sanitize else ["-Wl,-z,defs"])
    _forget_old(units, objects)
    return target


def build_or_explain() -> Path | None:
    """The library for a package that must also install without it: None, and the reason in a file of the package."""
    try:
        library = build()
    except (NotBuilt, OSError) as error:
        _explain(error)
        return None
    NOTICE.unlink(missing_ok=True)
    return library


def _explain(error: Exception) -> None:
    print(
        f"\ngyrfalcon: the CPU kernels are not built: {error}\n"
        "gyrfalcon: plain PyTorch will run instead, which is several times slower on a CPU.\n",
        getattr(error, "details", ""),
        file=sys.stderr,
    )
    try:
        LIBRARY.unlink(missing_ok=True)  # an older build does not fit the package any more
        NOTICE.write_text(f"{error}\n", encoding="utf-8")
    except OSError as cause:
        print(f"gyrfalcon: {NOTICE} cannot be written: {cause.strerror}", file=sys.stderr)


def _compiler() -> list[str]:
    given = os.environ.get("CXX")
    if given:
        command = shlex.split(given)
        if not shutil.which(command[0]):
            raise NotPossible(f"the compiler that CXX names, `{given}`, is not there")
        return command
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise NotPossible("there is no C++ compiler (c++, g++ or clang++); install one, such as g++, and install again")


def _units(command: list[str], *, sanitize: bool) -> list[Unit]:
    sources = sorted(SOURCES.glob("*.cpp"))
    if not sources:
        raise NotBuilt(f"{SOURCES} holds no sources")
    common = (*FLAGS, *(SANITIZE_FLAGS if sanitize else ()))
    plain = [Unit(source, common) for source in sources if not source.stem.startswith("kernels_")]
    special = []
    for kind, flags in KINDS.items():
        accepted = _accepts(command, flags)
        own = (*flags, f"-DGYRFALCON_ISA={kind}") if accepted else ("-DGYRFALCON_LEFT_OUT",)
        special.append(Unit(SOURCES / f"kernels_{kind}.cpp", (*common, *own)))
    return plain + special


def _accepts(command: list[str], flags: list[str]) -> bool:
    probe = [*command, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def _compile(command: list[str], unit: Unit, target: Path) -> None:
    if target.exists():
        return
    with tempfile.TemporaryDirectory(dir=OBJECTS) as folder:
        made = Path(folder) / target.name
        _run([*command, *unit.flags, "-c", str(unit.source), "-o", str(made)], unit.source)
        made.replace(target)  # whole or not at all, also when two builds run at once


def _link(command: list[str], objects: list[Path], target: Path, flags: list[str]) -> None:
    """Link unless the library was made of the same objects; then its date says that it is up to date."""
    exports = SOURCES / "exports.map"
    parts = "\n".join([*(path.name for path in objects), *flags, exports.read_text(encoding="utf-8")])
    record = OBJECTS / f"{target.parent.name}-linked.txt"
    if target.exists() and record.exists() and record.read_text(encoding="utf-8") == parts:
        os.utime(target)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        made = Path(folder) / target.name
        shown = f"-Wl,--version-script={exports}"
        _run([*command, "-shared", "-pthread", shown, *flags, *map(str, objects), "-o", str(made)])
        made.replace(target)
    record.write_text(parts, encoding="utf-8")


def _forget_old(units: list[Unit], objects: list[Path]) -> None:
    """Of each source keep the two newest objects besides those in use: the last edit is often taken back."""
    for stem in {unit.source.stem for unit in units}:
        others = [path for path in OBJECTS.glob(f"{stem}-*.o") if path not in objects]
        for path in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)[4:]:
            path.unlink(missing_ok=True)


def _with_includes(source: Path) -> list[Path]:
    """The file and all of ours that it includes, directly or not."""
    found: list[Path] = []
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path in found or not path.exists():
            continue
        found.append(path)
        waiting += [SOURCES / name for name in _INCLUDE.findall(path.read_text(encoding="utf-8"))]
    return found


def _run(command: list[str], source: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        what = f"{source.name} does not compile" if source else f"`{shlex.join(command[:2])}` failed"
        raise NotBuilt(f"{what} with {command[0]}", done.stderr or done.stdout)
    if done.stderr:
        print(done.stderr, file=sys.stderr)  # warnings
    return done.stdout


def sanitized_environment() -> dict[str, str]:
    """Variables with which Python runs the library with sanitizers, once that is built."""
    # Python itself is built without. The C++ library is named too, or PyTorch's exceptions would pass unseen and fail.
    preloaded = [_run([*_compiler(), f"-print-file-name={name}"]).strip() for name in ("libasan.so", "libstdc++.so.6")]
    for found in preloaded:
        if not Path(found).is_absolute():  # the name alone: it is not there
            raise NotPossible(f"{_compiler()[0]} has no {found}, which sanitizers need")
    return {
        "LD_PRELOAD": ":".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python frees little when it ends
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "GYRFALCON_CPU_LIBRARY": str(SANITIZED_LIBRARY),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the CPU kernels.")
    parser.add_argument(
        "--sanitize", nargs=argparse.REMAINDER, metavar="COMMAND", help="build with sanitizers and run COMMAND"
    )
    command = parser.parse_args().sanitize
    try:
        if command is not None:
            environment = os.environ | sanitized_environment()
            build(sanitize=True)
            return subprocess.run(command, env=environment, check=False).returncode if command else 0
        print(build())
        NOTICE.unlink(missing_ok=True)
    except NotPossible as error:
        if command is not None:
            print(error, file=sys.stderr)
            return 1
        _explain(error)  # whoever has no compiler can still work on the rest
    except NotBuilt as error:
        print(f"{error}\n{error.details}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
