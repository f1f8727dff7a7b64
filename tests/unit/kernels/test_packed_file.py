"""The file of packed weights: it gives back what was written or nothing, and never fails a start."""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from gyrfalcon.kernels.cpu import packed_file
from gyrfalcon.kernels.cpu.library import load
from gyrfalcon.kernels.cpu.packed_file import (
    Array,
    PackedWriter,
    checkpoint_fingerprint,
    choose_path,
    open_packed,
    write_packed,
)

pytestmark = pytest.mark.skipif(load() is None, reason="the CPU kernels are not built")

FACTS = {"checkpoint": "abc", "dtype": "bfloat16", "layout": "1"}


def arrays(seed: int = 0) -> dict[str, Array]:
    """Every kind of array that packed weights have, and sizes around those of a page and of a checksum's piece."""
    random = np.random.default_rng(seed)
    found: dict[str, Array] = {
        "empty": np.empty((0, 16), dtype=np.uint16),
        "scalar": np.array(3.5, dtype=np.float32),
        "facts": np.array([1, -2, 3], dtype=np.int32),
        "transposed": random.standard_normal((50, 30)).astype(np.float32).T,
    }
    for size in (1, 63, 64, 4096, 4097, 1024**2 - 1, 1024**2, 3 * 1024**2 + 5):
        found[f"bytes {size}"] = random.integers(0, 256, size, dtype=np.uint8)
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "made" / "on demand" / "int8.packed"


@pytest.fixture
def written(path: Path) -> Path:
    assert write_packed(path, FACTS, arrays().items())
    return path


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("num_threads", [1, 3, None])
def test_it_gives_back_what_was_written(written: Path, copy: bool, num_threads: int | None) -> None:
    found = open_packed(written, FACTS, num_threads=num_threads, copy=copy)

    assert found is not None
    assert list(found) == list(arrays())
    for name, expected in arrays().items():
        assert found[name].dtype == expected.dtype
        np.testing.assert_array_equal(found.array(name), expected, strict=True)
        assert found[name].ctypes.data % 4096 == 0
        assert not found[name].flags.writeable


@pytest.mark.parametrize("copy", [True, False])
def test_an_array_outlives_the_file_and_its_deletion(written: Path, copy: bool) -> None:
    found = open_packed(written, FACTS, copy=copy)
    assert found is not None
    array = found["bytes 4097"]
    written.unlink()
    del found
    gc.collect()

    np.testing.assert_array_equal(array, arrays()["bytes 4097"])


def test_arrays_are_taken_one_by_one(path: Path) -> None:
    alive: list[Array] = []

    def made() -> Iterator[tuple[str, Array]]:
        for index in range(5):
            gc.collect()
            assert len(gc.get_referrers(*alive)) <= 2 if alive else True
            array = np.full(1000, index)
            yield f"array {index}", array

    assert write_packed(path, FACTS, made())
    found = open_packed(path, FACTS)
    assert found is not None
    assert [int(found[f"array {index}"][0]) for index in range(5)] == [0, 1, 2, 3, 4]


def test_a_file_that_is_not_there_is_no_event(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert open_packed(path, FACTS) is None
    assert not caplog.records


def cut(size: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:size]


def flip(place: int) -> Callable[[bytes], bytes]:
    """One bit other, `place` counted from the end if negative."""

    def damage(data: bytes) -> bytes:
        at = place % len(data)
        return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]

    return damage


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "nothing in it": cut(0),
    "a part of the preamble": cut(20),
    "the preamble alone": cut(40),
    "cut by a byte": cut(-1),
    "cut in the arrays": cut(2 * 1024**2),
    "longer": lambda data: data + b"\0",
    "another kind of file": lambda data: b"PK\3\4" + data[4:],
    "never finished": lambda data: bytes(40) + data[40:],
    "a bit of the index's place": flip(17),
    "a bit of the index's size": flip(24),
    "a bit of the index's checksum": flip(32),
    "a bit of the index": flip(-30),
    "a bit of the first array": flip(4096),
    "a bit of the last array": lambda data: flip(struct.unpack_from("<Q", data, 16)[0] - 4096)(data),
    "a page of zeros": lambda data: data[: 2 * 1024**2] + bytes(4096) + data[2 * 1024**2 + 4096 :],
    "two pages exchanged": lambda data: (
        data[: 2 * 1024**2]
        + data[2 * 1024**2 + 4096 : 2 * 1024**2 + 8192]
        + data[2 * 1024**2 : 2 * 1024**2 + 4096]
        + data[2 * 1024**2 + 8192 :]
    ),
}


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_told_in_one_line_and_made_anew(
    written: Path, damage: Callable[[bytes], bytes], copy: bool, caplog: pytest.LogCaptureFixture
) -> None:
    written.write_bytes(damage(written.read_bytes()))

    assert open_packed(written, FACTS, copy=copy) is None

    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == "packed weights cannot be used and are made anew"
    assert record.__dict__["path"] == str(written)
    assert record.__dict__["reason"]
    assert write_packed(written, FACTS, arrays().items())
    assert open_packed(written, FACTS, copy=copy) is not None


def test_any_bit_of_an_array_is_missed_by_no_checksum(path: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    assert write_packed(path, FACTS, [("a", random.integers(0, 256, 1000, dtype=np.uint8))])
    sound = path.read_bytes()
    for bit in random.choice(8000, 200, replace=False):
        data = bytearray(sound)
        data[4096 + bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(data)
        assert open_packed(path, FACTS) is None, f"bit {bit}"


@pytest.mark.parametrize("facts", [{}, FACTS | {"checkpoint": "abd"}, FACTS | {"more": "x"}])
def test_a_file_made_from_something_else_is_passed_over(
    written: Path, facts: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert open_packed(written, facts) is None

    (record,) = caplog.records
    assert record.levelno == logging.INFO


def test_a_file_of_another_format_is_passed_over(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_file, "FORMAT_VERSION", packed_file.FORMAT_VERSION + 1)

    assert open_packed(written, FACTS) is None


def test_a_second_file_takes_the_firsts_place(written: Path) -> None:
    before = open_packed(written, FACTS, copy=False)
    assert write_packed(written, FACTS | {"dtype": "float32"}, arrays(seed=5).items())

    assert before is not None
    np.testing.assert_array_equal(before["bytes 4096"], arrays()["bytes 4096"])
    after = open_packed(written, FACTS | {"dtype": "float32"})
    assert after is not None
    np.testing.assert_array_equal(after["bytes 4096"], arrays(seed=5)["bytes 4096"])


WRITER = """
import sys
import numpy as np
from pathlib import Path
from gyrfalcon.kernels.cpu.packed_file import open_packed, write_packed
path, number = Path(sys.argv[1]), int(sys.argv[2])
for round in range(8):
    assert write_packed(path, {}, [(f"a{i}", np.full(300_000, number)) for i in range(3)])
    found = open_packed(path, {})
    assert found is not None and len({int(v) for a in found.values() for v in (a.min(), a.max())}) == 1
"""


def test_writers_at_the_same_time_leave_one_whole_file(path: Path) -> None:
    running = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(number)]) for number in range(3)]

    assert [process.wait(timeout=60) for process in running] == [0, 0, 0]

    assert open_packed(path, {}) is not None
    assert [file.name for file in path.parent.iterdir()] == [path.name]


SMALL_DISK = """
import resource, sys
import numpy as np
from pathlib import Path
from gyrfalcon.kernels.cpu.packed_file import write_packed
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
path = Path(sys.argv[1])
assert not write_packed(path, {}, [("a", np.zeros(500_000, np.uint8)), ("b", np.zeros(900_000, np.uint8))])
assert list(path.parent.iterdir()) == []
assert write_packed(path, {}, [("a", np.zeros(500_000, np.uint8))])
"""


def test_a_write_that_finds_no_room_leaves_nothing(path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SMALL_DISK, str(path)], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert "packed weights cannot be kept" in done.stderr


def test_the_last_of_a_disk_is_left_to_others(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.fstatvfs

    def nearly_full(handle: int) -> os.statvfs_result:
        values = list(real(handle))
        values[4] = packed_file._SPARED_BYTES // values[1]  # free blocks
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "fstatvfs", nearly_full)

    assert not write_packed(path, FACTS, arrays().items())
    assert caplog.records[0].__dict__["reason"] == os.strerror(errno.ENOSPC)
    assert list(path.parent.iterdir()) == []


def test_a_place_that_is_no_folder_is_told_and_nothing_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")

    assert not write_packed(tmp_path / "file" / "int8.packed", FACTS, arrays().items())
    assert caplog.records[0].getMessage() == "packed weights cannot be kept; the next start packs them again"


def test_an_error_while_packing_is_not_hidden_and_leaves_nothing(path: Path) -> None:
    def failing() -> Iterator[tuple[str, Array]]:
        yield "a", np.zeros(3)
        raise RuntimeError("the checkpoint changed")

    with pytest.raises(RuntimeError, match="the checkpoint changed"):
        write_packed(path, FACTS, failing())

    assert list(path.parent.iterdir()) == []


def test_a_writer_that_does_not_commit_leaves_nothing(path: Path) -> None:
    with PackedWriter(path, FACTS) as writer:
        writer.add("a", np.zeros(3))

    assert list(path.parent.iterdir()) == []


def test_a_writer_refuses_what_could_not_be_read(path: Path) -> None:
    with PackedWriter(path, FACTS) as writer:
        writer.add("a", np.zeros(3))
        with pytest.raises(ValueError, match="`a` was added before"):
            writer.add("a", np.zeros(3))
        with pytest.raises(ValueError, match="`b` is of dtype object"):
            writer.add("b", np.array([None]))


def test_what_a_killed_writer_left_is_removed_once_it_is_old(path: Path) -> None:
    path.parent.mkdir(parents=True)
    old, young = path.with_name("int8.packed.old.tmp"), path.with_name("int8.packed.young.tmp")
    other = path.with_name("int4.packed.old.tmp")
    long_ago = time.time() - 2 * packed_file._ABANDONED_AFTER_S
    for file in (old, young, other):
        file.write_bytes(b"")
    for file in (old, other):
        os.utime(file, (long_ago, long_ago))

    assert write_packed(path, FACTS, arrays().items())

    assert sorted(path.parent.iterdir()) == [other, path, young]


def make_checkpoint(folder: Path, num_bytes: int = 10) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    header = json.dumps({"a": {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + num_bytes)  # without blocks on the disk
    return folder


def test_the_fingerprint_changes_with_the_checkpoint(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    weights, config = folder / "model.safetensors", folder / "config.json"
    seen = [checkpoint_fingerprint(folder)]
    assert checkpoint_fingerprint(folder) == seen[0]

    times = (time.time(), weights.stat().st_mtime + 1)
    os.utime(weights, times)
    seen.append(checkpoint_fingerprint(folder))
    weights.write_bytes(weights.read_bytes().replace(b'"a"', b'"b"'))
    os.utime(weights, times)
    seen.append(checkpoint_fingerprint(folder))
    (folder / "model-2.safetensors").write_bytes(weights.read_bytes())
    seen.append(checkpoint_fingerprint(folder))
    state = config.stat()
    config.write_text("[]")
    os.utime(config, ns=(state.st_atime_ns, state.st_mtime_ns))
    seen.append(checkpoint_fingerprint(folder))
    (folder / "tokenizer.json").write_text("{}")

    assert len(set(seen)) == 5
    assert checkpoint_fingerprint(folder) == seen[-1]


LARGE = packed_file.MIN_CHECKPOINT_BYTES


def test_it_lies_beside_a_checkpoint_that_can_be_written_to(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", LARGE)

    assert choose_path(folder, "int8") == folder / ".gyrfalcon" / "int8.packed"


def test_it_lies_in_the_users_cache_where_the_checkpoint_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = make_checkpoint(tmp_path / "a" / "model", LARGE), make_checkpoint(tmp_path / "b" / "model", LARGE)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the super-user may write anywhere
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    first, second = choose_path(one, "int8"), choose_path(other, "int8")

    assert first is not None
    assert first.parents[1] == tmp_path / "cache" / "gyrfalcon" / "packed"
    assert first.name == "int8.packed"
    assert first.parent.name.startswith("model-")
    assert second is not None
    assert first.parent != second.parent

    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    third = choose_path(one, "int8")
    assert third is not None
    assert third.parents[1] == tmp_path / "home" / ".cache" / "gyrfalcon" / "packed"


def test_a_file_that_came_with_a_read_only_checkpoint_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path / "model", LARGE)
    beside = folder / ".gyrfalcon" / "int8.packed"
    assert write_packed(beside, FACTS, arrays().items())
    monkeypatch.setattr(os, "access", lambda path, mode: False)

    assert choose_path(folder, "int8") == beside


def test_a_folder_that_the_operator_chose_serves_any_checkpoint(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")

    chosen = choose_path(folder, "int8", tmp_path / "chosen")

    assert chosen is not None
    assert chosen.parents[1] == tmp_path / "chosen"
    assert choose_path(folder, "int8") is None  # too small to be worth a file, if nobody asks


def test_reading_needs_no_more_memory_than_the_arrays(path: Path) -> None:
    """The file's pages are not mapped besides."""
    assert write_packed(path, FACTS, [("a", np.ones(96 * 1024**2, dtype=np.uint8))])
    code = (
        "import re, sys; from pathlib import Path\n"
        "from gyrfalcon.kernels.cpu.packed_file import open_packed\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])\n"
        "before = peak()\n"
        f"found = open_packed(Path(sys.argv[1]), {FACTS!r})\n"
        "print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)

    assert 90 * 1024 <= int(done.stdout) <= 110 * 1024
