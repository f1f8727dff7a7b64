"""A file that keeps packed weights between starts. It may be deleted at any time, and is never needed.

    0      preamble of 40 bytes: magic, version, where the index lies, its size and checksum
    4096   the arrays' bytes, each array at a multiple of 4096
    end    the index, JSON: what the file was made from, and each array's name, dtype, shape, place and checksum

The index comes last because arrays are written as they are made; the preamble is written after everything else, so a
file that was not finished has none. Files appear under their name whole, by renaming. Nothing waits for the disk: the
checksums find what a loss of power has left undone. A file that is damaged, or made from something else, is not used:
it costs a line in the log and the time to make it anew, never a start.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import mmap
import os
import struct
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from gyrfalcon.kernels.cpu.library import load

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]

FORMAT_VERSION = 1

# Checkpoints below this are packed faster than a file is looked for, opened and checked.
MIN_CHECKPOINT_BYTES = 64 * 1024**2

_MAGIC = b"GYRFPACK"
_PREAMBLE = struct.Struct("<8sIxxxxQQQ")  # magic, version, index's offset, size and checksum
_PAGE = 4096
_HUGE_PAGE = 2 * 1024**2
# Read or written, and checked, at once: half of a core's second-level cache. The checksums of an array's pieces are
# summed up in turn, so this is part of the format.
_PIECE = 1024**2
_MAX_INDEX_BYTES = 256 * 1024**2
_MAX_THREADS = 16
# Pieces that one thread takes in a row: neighbours share huge pages, and each page is cleared by who touches it first.
_RUN = 32
# Left free on the disk, which is not ours alone.
_SPARED_BYTES = 512 * 1024**2
# A temporary file that has not grown for so long belongs to a process that was killed.
_ABANDONED_AFTER_S = 3600.0


class _Unusable(Exception):
    """The file cannot be read; the message says why."""


class _Stale(Exception):
    """The file is sound and was made from something else."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One array of the index."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    checksum: int


class PackedFile(Mapping[str, Array]):
    """The arrays of a packed file by name, read-only. They stay readable for as long as any of them is referred to."""

    def __init__(self, arrays: Mapping[str, Array], num_bytes: int) -> None:
        """num_bytes: of memory or address space that all of them take together."""
        self._arrays = dict(arrays)
        self.num_bytes = num_bytes

    def array(self, name: str) -> Array:
        return self._arrays[name]

    def __getitem__(self, name: str) -> Array:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def choose_path(checkpoint: Path, name: str, folder: Path | None = None) -> Path | None:
    """The file that keeps the packed weights `name` of a checkpoint's folder; None for nowhere.

    folder: one that the operator chose. If None, a hidden folder beside the weights where there is such a file already
    or the folder can be written to, otherwise the user's cache; and nowhere for a small checkpoint.
    """
    resolved = checkpoint.resolve()
    own_folder = f"{resolved.name}-{hashlib.sha256(os.fsencode(resolved)).hexdigest()[:12]}"
    if folder is not None:
        return folder / own_folder / f"{name}.packed"
    if sum(path.stat().st_size for path in resolved.glob("*.safetensors")) < MIN_CHECKPOINT_BYTES:
        return None
    beside = resolved / ".gyrfalcon" / f"{name}.packed"
    if beside.exists() or os.access(beside.parent if beside.parent.exists() else resolved, os.W_OK):
        return beside
    return _users_cache() / own_folder / f"{name}.packed"


def checkpoint_fingerprint(checkpoint: Path) -> str:
    """Changes when the checkpoint does: from names, sizes and times of its files, and what the headers hold.

    Raises OSError where a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in _checkpoint_files(checkpoint):
        state = path.stat()
        digest.update(f"{path.name}\0{state.st_size}\0{state.st_mtime_ns}\0".encode())
        with path.open("rb") as file:
            if path.suffix == ".json":
                digest.update(file.read())
            else:
                start = file.read(8)
                digest.update(start + file.read(min(int.from_bytes(start, "little"), _MAX_INDEX_BYTES)))
    return digest.hexdigest()


def open_packed(
    path: Path, facts: Mapping[str, str], *, num_threads: int | None = None, copy: bool = True
) -> PackedFile | None:
    """The arrays that were written with equal facts, every byte checked; None if there is no such file.

    num_threads: that read and check; all cores if absent. copy: read into memory of huge pages; otherwise the arrays
    are the file's own pages, shared with other processes (then the file must not be cut short in place).
    """
    threads = num_threads or min(len(os.sched_getaffinity(0)), _MAX_THREADS)
    try:
        with path.open("rb", buffering=0) as file:
            entries, end = _read_index(file, facts)
            memory = _empty_memory(end) if copy else _mapping(file, end)
            _fill_and_check(file, entries, memory, threads, copy=copy)
    except FileNotFoundError:
        return None
    except _Stale:
        logger.info("packed weights are of another checkpoint or version, and are made anew", extra={"path": str(path)})
        return None
    except (_Unusable, OSError, MemoryError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or "no memory"
        logger.warning("packed weights cannot be used and are made anew", extra={"path": str(path), "reason": reason})
        return None
    memory.flags.writeable = False
    return PackedFile({entry.name: _view(memory, entry) for entry in entries}, end)


def write_packed(path: Path, facts: Mapping[str, str], arrays: Iterable[tuple[str, Array]]) -> bool:
    """Write a file of the arrays, taking each from the iterator when the one before is written; whether it worked.

    A failure to write is a line in the log; an error of the iterator itself is raised.
    """
    try:
        writer = PackedWriter(path, facts)
    except OSError as error:
        _log_not_written(path, error)
        return False
    with writer:
        for name, array in arrays:
            try:
                writer.add(name, array)
            except OSError as error:
                _log_not_written(path, error)
                return False
        try:
            writer.commit()
        except OSError as error:
            _log_not_written(path, error)
            return False
    return True


class PackedWriter:
    """Writes one packed file; what was not committed when the context ends leaves no trace."""

    def __init__(self, path: Path, facts: Mapping[str, str]) -> None:
        """Raises OSError where the file cannot be made."""
        self._path = path
        self._facts = dict(facts)
        self._entries: list[dict[str, object]] = []
        self._names: set[str] = set()
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".tmp")
        self._temporary = Path(temporary)
        self._file: BinaryIO = os.fdopen(handle, "wb", buffering=0)
        self._position = _PAGE

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)

    def add(self, name: str, array: Array) -> None:
        """Raises OSError where it cannot be written, ValueError for a name given before or a dtype without bytes."""
        if name in self._names:
            raise ValueError(f"array `{name}` was added before")
        if array.dtype.kind not in "biuf":
            raise ValueError(f"array `{name}` is of dtype {array.dtype}; expected numbers")
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        disk = os.fstatvfs(self._file.fileno())
        if disk.f_bavail * disk.f_frsize < data.nbytes + _SPARED_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._names.add(name)
        self._entries.append(
            {
                "name": name,
                "dtype": array.dtype.str,
                "shape": list(array.shape),
                "offset": self._position,
                "bytes": data.nbytes,
                "checksum": f"{_checksum(data):016x}",
            }
        )
        self._write(data.data, self._position)
        self._position = _aligned(self._position + data.nbytes, _PAGE)

    def commit(self) -> None:
        """Finish the file and give it its name. Raises OSError where that fails."""
        index = json.dumps({"facts": self._facts, "arrays": self._entries}).encode()
        self._write(memoryview(index), self._position)
        checksum = _checksum(np.frombuffer(index, dtype=np.uint8))
        preamble = _PREAMBLE.pack(_MAGIC, FORMAT_VERSION, self._position, len(index), checksum)
        self._write(memoryview(preamble), 0)
        self._temporary.replace(self._path)

    def _write(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._file.fileno(), data[done : done + 64 * _PIECE], offset + done)


def _log_not_written(path: Path, error: OSError) -> None:
    logger.warning(
        "packed weights cannot be kept; the next start packs them again",
        extra={"path": str(path), "reason": error.strerror or str(error)},
    )


def _checkpoint_files(checkpoint: Path) -> list[Path]:
    """What the weights depend on: the configuration, the shards' index and the shards."""
    named = [checkpoint / name for name in ("config.json", "quantize_config.json", "model.safetensors.index.json")]
    return [path for path in named if path.exists()] + sorted(checkpoint.glob("*.safetensors"))


def _users_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    # The specification has relative paths ignored.
    root = Path(base) if base and Path(base).is_absolute() else Path("~/.cache").expanduser()
    return root / "gyrfalcon" / "packed"


def _read_index(file: BinaryIO, facts: Mapping[str, str]) -> tuple[list[_Entry], int]:
    """The arrays' entries and where their bytes end."""
    size = os.fstat(file.fileno()).st_size
    start = os.pread(file.fileno(), _PREAMBLE.size, 0)
    if len(start) < _PREAMBLE.size or start[: len(_MAGIC)] != _MAGIC:
        raise _Unusable("it does not begin as a packed file does")
    _, version, offset, index_bytes, checksum = _PREAMBLE.unpack(start)
    if version != FORMAT_VERSION:
        raise _Stale
    if offset + index_bytes != size or index_bytes > _MAX_INDEX_BYTES:
        raise _Unusable(f"it is {size} bytes long, expected {offset + index_bytes}")
    index = os.pread(file.fileno(), index_bytes, offset)
    if len(index) != index_bytes or _checksum(np.frombuffer(index, dtype=np.uint8)) != checksum:
        raise _Unusable("its index does not have its checksum")
    document = json.loads(index)  # what was written: the checksum has said so
    if document["facts"] != dict(facts):
        raise _Stale
    entries = [
        _Entry(
            entry["name"],
            entry["dtype"],
            tuple(entry["shape"]),
            entry["offset"],
            entry["bytes"],
            int(entry["checksum"], 16),
        )
        for entry in document["arrays"]
    ]
    return entries, offset


def _empty_memory(num_bytes: int) -> Array:
    """Memory of its own for the arrays, at the places that they have in the file; zeros, in huge pages where it can."""
    area = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = np.frombuffer(area, dtype=np.uint8)
    first = -memory.ctypes.data % _HUGE_PAGE
    with contextlib.suppress(OSError):  # a system without huge pages serves a little slower
        area.madvise(mmap.MADV_HUGEPAGE, 0, len(area))
    return memory[first : first + num_bytes]


def _mapping(file: BinaryIO, num_bytes: int) -> Array:
    area = mmap.mmap(file.fileno(), num_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    return np.frombuffer(area, dtype=np.uint8)


def _fill_and_check(file: BinaryIO, entries: list[_Entry], memory: Array, num_threads: int, *, copy: bool) -> None:
    checksum = _checksum_function()
    pieces = [
        (entry.offset + start, min(_PIECE, entry.num_bytes - start))
        for entry in entries
        for start in range(0, entry.num_bytes, _PIECE)
    ]

    def read(first: int) -> list[int]:
        sums = []
        for offset, num_bytes in pieces[first : first + _RUN]:
            data = memory[offset : offset + num_bytes]
            if copy:
                _read_exactly(file, offset, data.data)
            sums.append(checksum(data))
        return sums

    with ThreadPoolExecutor(num_threads) as pool:
        found = chain.from_iterable(pool.map(read, range(0, len(pieces), _RUN)))
        for entry in entries:
            sums = [next(found) for _ in range(0, entry.num_bytes, _PIECE)]
            if _sum_up(sums) != entry.checksum:
                raise _Unusable(f"array `{entry.name}` does not have its checksum")


def _read_exactly(file: BinaryIO, offset: int, target: memoryview) -> None:
    done = 0
    while done < len(target):
        count = os.preadv(file.fileno(), [target[done:]], offset + done)
        if not count:
            raise _Unusable(f"it ended at byte {offset + done} while it was read")
        done += count


def _view(memory: Array, entry: _Entry) -> Array:
    data = memory[entry.offset : entry.offset + entry.num_bytes]
    return data.view(np.dtype(entry.dtype)).reshape(entry.shape)


def _checksum(data: Array) -> int:
    """Of bytes: the checksum of the checksums of their pieces, so that threads can share the work out."""
    checksum = _checksum_function()
    return _sum_up([checksum(data[start : start + _PIECE]) for start in range(0, len(data), _PIECE)])


def _sum_up(piece_checksums: list[int]) -> int:
    return _checksum_function()(np.array(piece_checksums, dtype="<u8").view(np.uint8))


@cache
def _checksum_function() -> Callable[[Array], int]:
    library = load()
    assert library is not None, "packed weights are for the kernels"
    function = library.gyrfalcon_checksum
    return lambda data: int(function(data.ctypes.data, len(data)))


def _aligned(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _remove_abandoned(path: Path) -> None:
    """What writers left that were killed."""
    limit = time.time() - _ABANDONED_AFTER_S
    for other in path.parent.glob(f"{path.name}.*.tmp"):
        with contextlib.suppress(OSError):
            if other.stat().st_mtime < limit:
                other.unlink()
