"""The kernels' shared library: finding it, loading it, and choosing the kind that this processor runs.

GYRFALCON_CPU_KERNELS forces a kind (`amx`, `avx512`, `avx2`) or `off`; `auto` takes the best. No torch here: also the
command line asks.
"""

from __future__ import annotations

import ctypes
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

from gyrfalcon.config import CPU_KERNELS_VARIABLE, CPU_LIBRARY_VARIABLE
from gyrfalcon.errors import SettingsError
from gyrfalcon.kernels.cpu.structures import CDecoderSpec, CLayer, CMatrix, CStep

logger = logging.getLogger(__name__)

Kind = Literal["amx", "avx512", "avx2"]
KINDS: tuple[Kind, ...] = ("amx", "avx512", "avx2")  # the best first

_FOLDER = Path(__file__).parent
_BUILT = _FOLDER / "libgyrfalcon_cpu.so"
_NOT_BUILT = _FOLDER / "not_built.txt"  # why, as the package's build found
_SOURCES = _FOLDER.parents[3] / "csrc"  # in a checkout

# As csrc/variants.h has them.
_NOT_IN_BUILD, _NOT_HERE, _RUNS = 0, 1, 2

_int, _long, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p

# What csrc/api.cpp, checksum.h and variants.h export: results and arguments.
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "gyrfalcon_kernels_availability": (_int, [ctypes.c_char_p]),
    "gyrfalcon_kernels": (_pointer, [ctypes.c_char_p]),
    "gyrfalcon_structure_sizes": (None, [_pointer] * 4),
    "gyrfalcon_panel_bytes": (_long, [_int, _int, _int]),
    "gyrfalcon_pack": (None, [_int, _pointer, _int, _int, _pointer, _int, _pointer, _pointer]),
    "gyrfalcon_checksum": (ctypes.c_uint64, [_pointer, ctypes.c_size_t]),
    "gyrfalcon_decoder_new": (_pointer, [_pointer, _pointer, _int]),
    "gyrfalcon_decoder_free": (None, [_pointer]),
    "gyrfalcon_decoder_forward": (_int, [_pointer, _pointer, _pointer]),
    "gyrfalcon_decoder_choose_next": (_int, [_pointer, _pointer, _pointer, _int, _int, _pointer, _pointer, _pointer]),
    "gyrfalcon_decoder_logits": (_int, [_pointer, _pointer, _int, _pointer]),
    "gyrfalcon_decoder_choose_greedy": (None, [_pointer, _pointer, _int, _int, _pointer, _pointer, _pointer]),
}


def load() -> ctypes.CDLL | None:
    """The library, or None where plain PyTorch has to serve: not built, no fitting processor, or switched off.

    Raises SettingsError where GYRFALCON_CPU_KERNELS is no kind, or one that does not run here.
    """
    return _open(_path()) if chosen_kind() is not None else None


def chosen_kind() -> Kind | None:
    """The kind of kernels in use, None for none. Raises as `load` does."""
    asked = os.environ.get(CPU_KERNELS_VARIABLE) or "auto"
    if asked == "off":
        return None
    if asked != "auto" and asked not in KINDS:
        raise SettingsError(
            CPU_KERNELS_VARIABLE, f"`{asked}` is none of `auto`, {', '.join(f'`{kind}`' for kind in KINDS)} and `off`"
        )
    library = _open(_path())
    if asked == "auto":
        return next((kind for kind in KINDS if library is not None and _availability(library, kind) == _RUNS), None)
    if library is None:
        raise SettingsError(CPU_KERNELS_VARIABLE, f"`{asked}` cannot run: {_why_not_loaded()}")
    found = _availability(library, asked)
    if found == _NOT_IN_BUILD:
        raise SettingsError(CPU_KERNELS_VARIABLE, f"`{asked}` was left out by the compiler that built the library")
    if found == _NOT_HERE:
        raise SettingsError(
            CPU_KERNELS_VARIABLE, f"`{asked}` does not run here: this processor, or its system, does not have it"
        )
    return cast(Kind, asked)


def available_kinds() -> tuple[Kind, ...]:
    """The kinds that this build has and this processor runs, the best first."""
    library = _open(_path())
    return tuple(kind for kind in KINDS if library is not None and _availability(library, kind) == _RUNS)


def describe() -> str:
    """Which kernels are in use, and why not better ones, in a line. Raises as `load` does."""
    kind = chosen_kind()
    if kind is not None:
        others = [other for other in available_kinds() if other != kind]
        return f"{kind}{' (also here: ' + ', '.join(others) + ')' if others else ''}"
    if os.environ.get(CPU_KERNELS_VARIABLE) == "off":
        return f"plain PyTorch: {CPU_KERNELS_VARIABLE} is off"
    if _open(_path()) is None:
        return f"plain PyTorch: {_why_not_loaded()}"
    return "plain PyTorch: the kernels need a processor with AVX2, FMA and F16C"


def _path() -> Path:
    """GYRFALCON_CPU_LIBRARY names another build, such as one with sanitizers."""
    return Path(os.environ.get(CPU_LIBRARY_VARIABLE) or _BUILT)


@cache
def _open(path: Path) -> ctypes.CDLL | None:
    if not path.exists():
        return None
    _warn_if_older_than_its_sources(path)
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        _check_structures(library)
    except (OSError, AttributeError) as error:
        logger.warning("the CPU kernels cannot be loaded", extra={"path": str(path), "reason": str(error)})
        return None
    return library


def _check_structures(library: ctypes.CDLL) -> None:
    """Raise OSError where the library lays a structure out in another way than this package does."""
    structures = (CMatrix, CLayer, CDecoderSpec, CStep)
    sizes = [ctypes.c_int64() for _ in structures]
    library.gyrfalcon_structure_sizes(*(ctypes.byref(size) for size in sizes))
    if [size.value for size in sizes] != [ctypes.sizeof(structure) for structure in structures]:
        raise OSError("it was built from other sources than this package's; build it again")


def _availability(library: ctypes.CDLL, kind: str) -> int:
    return int(library.gyrfalcon_kernels_availability(kind.encode()))


def _why_not_loaded() -> str:
    if _path().exists():
        return f"{_path()} cannot be loaded (see the log)"
    if _path() != _BUILT:
        return f"{_path()} is not there ({CPU_LIBRARY_VARIABLE})"
    try:
        reason = _NOT_BUILT.read_text(encoding="utf-8").strip()
    except OSError:
        reason = "this package was built without them"
    return f"the CPU kernels are not built: {reason}"


def _warn_if_older_than_its_sources(path: Path) -> None:
    """In a checkout an edited source changes nothing before the next build."""
    try:
        built = path.stat().st_mtime_ns
        newer = sorted(source.name for source in _SOURCES.iterdir() if source.stat().st_mtime_ns > built)
    except OSError:
        return
    if newer:
        logger.warning("the CPU kernels are older than their sources; run `make native`", extra={"newer": newer})
