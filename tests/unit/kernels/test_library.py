"""Finding the kernels' library and choosing the kind that runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gyrfalcon.config import CPU_KERNELS_VARIABLE, CPU_LIBRARY_VARIABLE, resolve
from gyrfalcon.errors import SettingsError
from gyrfalcon.kernels.cpu import library
from gyrfalcon.kernels.cpu.library import KINDS, available_kinds, chosen_kind, describe, load

needs_library = pytest.mark.skipif(not available_kinds(), reason="the CPU kernels are not built or do not run here")


@needs_library
def test_the_best_kind_is_taken() -> None:
    assert load() is not None
    assert chosen_kind() == available_kinds()[0]
    assert describe().startswith(available_kinds()[0])


@needs_library
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_can_be_forced_where_it_runs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CPU_KERNELS_VARIABLE, kind)
    if kind in available_kinds():
        assert chosen_kind() == kind
        assert load() is not None
        assert describe().startswith(kind)
    else:
        with pytest.raises(SettingsError, match=f"{CPU_KERNELS_VARIABLE}: `{kind}` (does not run here|was left out)"):
            load()


@pytest.mark.parametrize("value", ["auto", ""])
def test_auto_is_the_default(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = chosen_kind()
    monkeypatch.setenv(CPU_KERNELS_VARIABLE, value)
    assert chosen_kind() == expected


def test_off_leaves_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CPU_KERNELS_VARIABLE, "off")
    assert load() is None
    assert chosen_kind() is None
    assert describe() == "plain PyTorch: GYRFALCON_CPU_KERNELS is off"


@pytest.mark.parametrize("value", ["sse2", "AMX", "on"])
def test_an_unknown_kind_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CPU_KERNELS_VARIABLE, value)
    with pytest.raises(SettingsError, match=f"`{value}` is none of `auto`, `amx`, `avx512`, `avx2` and `off`"):
        load()


def test_without_a_library_plain_pytorch_serves_and_a_forced_kind_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / "missing.so"
    monkeypatch.setenv(CPU_LIBRARY_VARIABLE, str(missing))
    assert load() is None
    assert describe() == f"plain PyTorch: {missing} is not there (GYRFALCON_CPU_LIBRARY)"
    monkeypatch.setenv(CPU_KERNELS_VARIABLE, "avx2")
    with pytest.raises(SettingsError, match="`avx2` cannot run: .*missing.so is not there"):
        load()


def test_the_reason_of_a_build_without_kernels_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_BUILT", tmp_path / "library.so")
    monkeypatch.setattr(library, "_NOT_BUILT", tmp_path / "not_built.txt")
    assert describe() == "plain PyTorch: the CPU kernels are not built: this package was built without them"
    (tmp_path / "not_built.txt").write_text("there is no C++ compiler\n")
    assert describe() == "plain PyTorch: the CPU kernels are not built: there is no C++ compiler"


def test_a_file_that_is_no_library_is_told_and_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"\x7fELF and no more")
    monkeypatch.setenv(CPU_LIBRARY_VARIABLE, str(broken))
    assert load() is None
    assert "the CPU kernels cannot be loaded" in caplog.messages
    assert describe() == f"plain PyTorch: {broken} cannot be loaded (see the log)"


@needs_library
def test_a_library_older_than_its_sources_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "library.so"
    path.symlink_to(library._BUILT)
    built = path.stat().st_mtime
    sources = tmp_path / "csrc"
    sources.mkdir()
    for name, age in (("old.cpp", -10), ("new.h", 10)):
        (sources / name).write_text("")
        os.utime(sources / name, (built + age, built + age))
    monkeypatch.setattr(library, "_SOURCES", sources)
    monkeypatch.setenv(CPU_LIBRARY_VARIABLE, str(path))
    assert load() is not None
    (record,) = [record for record in caplog.records if "older than their sources" in record.getMessage()]
    assert record.__dict__["newer"] == ["new.h"]


def test_its_variables_are_known_to_the_settings() -> None:
    resolve(environ={CPU_KERNELS_VARIABLE: "off", CPU_LIBRARY_VARIABLE: "x.so"})
    with pytest.raises(SettingsError, match="did you mean `GYRFALCON_CPU_KERNELS`"):
        resolve(environ={"GYRFALCON_CPU_KERNEL": "off"})


def test_asking_does_not_need_torch() -> None:
    code = "import sys, gyrfalcon.kernels.cpu.library as it; it.describe(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
