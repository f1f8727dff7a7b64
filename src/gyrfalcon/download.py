"""Fetching a checkpoint ahead of serving: with lines that say how far it is, and every byte checked at the end.

The Hub's cache names each file by its checksum: SHA-256 for large files, Git's blob hash (SHA-1) for the others. A
downloaded file is compared with its own name, so the check needs no network and no list of checksums.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gyrfalcon.errors import ModelLoadError
from gyrfalcon.hub import Checkpoint, default_cache, hub_source, locate_checkpoint

_CHUNK_BYTES = 8 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT_HASH = re.compile(r"[0-9a-f]{40}")
_POLL_S = 1.0

OnBytes = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Fetched:
    """A checkpoint that is all there. num_files and num_bytes: those whose checksums were compared."""

    checkpoint: Checkpoint
    num_files: int
    num_bytes: int


def fetch(
    model: str,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    offline: bool = False,
    on_fetched: OnBytes = lambda num_bytes: None,
    on_checked: OnBytes = lambda num_bytes: None,
) -> Fetched:
    """Download what the cache lacks of `model`, then compare every file with its checksum.

    model: as for `locate_checkpoint`; of a folder and the bundled checkpoint nothing is fetched, and there is nothing
    to compare with. on_fetched: called about once a second with the bytes that the repository's folder in the cache
    holds. on_checked: called with the bytes compared so far.

    A file that differs is removed, so that the next attempt fetches it again. Raises ModelLoadError.
    """
    source = hub_source(model)
    blobs = None if source is None else _blobs(source, cache_dir)
    with _watching(blobs, on_fetched):
        checkpoint = locate_checkpoint(model, revision=revision, cache_dir=cache_dir, offline=offline)
    if source is None:
        return Fetched(checkpoint, 0, 0)
    files = [path for path in sorted(checkpoint.folder.rglob("*")) if path.is_file()]
    num_bytes = 0
    for path in files:
        num_bytes += _check(path, lambda done, before=num_bytes: on_checked(before + done))  # type: ignore[misc]
    return Fetched(checkpoint, len(files), num_bytes)


def _blobs(source: str, cache_dir: Path | None) -> Path:
    return (cache_dir or default_cache()) / f"models--{source.replace('/', '--')}" / "blobs"


@contextmanager
def _watching(folder: Path | None, on_bytes: OnBytes) -> Iterator[None]:
    """Report how many bytes the folder's files take on the disk, from a thread, until the block is left."""
    if folder is None:
        yield
        return
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_POLL_S):
            on_bytes(_disk_bytes(folder))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        on_bytes(_disk_bytes(folder))


def _disk_bytes(folder: Path) -> int:
    """Bytes on the disk: a file that is fetched in parts may have its whole length from the start."""
    total = 0
    for path in folder.glob("*"):
        try:
            total += path.stat().st_blocks * 512
        except OSError:  # renamed in this moment
            continue
    return total


def _check(path: Path, on_bytes: OnBytes) -> int:
    """Compare a file of the cache with the checksum that its blob is named by; its size."""
    blob = path.resolve()
    size = blob.stat().st_size
    if _SHA256.fullmatch(blob.name):
        digest = hashlib.sha256()
    elif _GIT_HASH.fullmatch(blob.name):
        digest = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    else:  # a cache without links has the files themselves, under their own names
        return size
    done = 0
    with blob.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            on_bytes(done)
    if digest.hexdigest() != blob.name:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise ModelLoadError(
            f"{path}: its {size} bytes have the checksum {digest.hexdigest()}, expected {blob.name}; the file was "
            "damaged on the way or on the disk, and has been removed: run the download again"
        )
    return size


class ProgressLines:
    """Says how far something is, at most every `interval_s` seconds, through `say`."""

    def __init__(self, say: Callable[[int, float], None], interval_s: float = 5.0) -> None:
        """say: receives the bytes so far and the bytes per second since the line before."""
        self._say = say
        self._interval_s = interval_s
        self._last_s = time.monotonic()
        self._last_bytes: int | None = None

    def __call__(self, num_bytes: int) -> None:
        now = time.monotonic()
        if self._last_bytes is None:
            self._last_bytes = num_bytes
        if now - self._last_s >= self._interval_s:
            self._say(num_bytes, max(0, num_bytes - self._last_bytes) / (now - self._last_s))
            self._last_s, self._last_bytes = now, num_bytes
