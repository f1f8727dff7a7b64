"""The wheel: it holds what serving needs, and no more than a download may weigh."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gyrfalcon import __version__

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    (made,) = folder.glob(f"gyrfalcon-{__version__}-py3-none-*.whl")
    return zipfile.ZipFile(made)


def built_from_copy(folder: Path, **environment: str) -> tuple[zipfile.ZipFile, str]:
    """The wheel that a copy of the sources gives in an environment, and what its build said."""
    copy = folder / "copy"
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    for name in ("README.md", "LICENSE", "pyproject.toml", "hatch_build.py", "tools/build_native.py"):
        (copy / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    package = copy / "src" / "gyrfalcon" / "kernels" / "cpu"
    package.mkdir(parents=True)
    shutil.copy(ROOT / "src" / "gyrfalcon" / "__init__.py", copy / "src" / "gyrfalcon")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    done = subprocess.run(
        command, cwd=copy, check=True, capture_output=True, text=True, timeout=60, env=os.environ | environment
    )
    (made,) = folder.glob("*.whl")
    return zipfile.ZipFile(made), done.stderr


def test_it_holds_every_module_and_the_bundled_checkpoint(wheel: zipfile.ZipFile) -> None:
    package = ROOT / "src" / "gyrfalcon"
    files = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    names = set(wheel.namelist())
    assert {str(path.relative_to(ROOT / "src")) for path in files} <= names
    for name in ("py.typed", "eyas/config.json", "eyas/model.safetensors", "eyas/tokenizer.json"):
        assert f"gyrfalcon/{name}" in names


def test_it_holds_nothing_besides_the_package(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"gyrfalcon", f"gyrfalcon-{__version__}.dist-info"}


def test_it_stays_small(wheel: zipfile.ZipFile) -> None:
    assert sum(entry.compress_size for entry in wheel.infolist()) <= 16 * 1024**2


LIBRARY, NOTICE = "gyrfalcon/kernels/cpu/libgyrfalcon_cpu.so", "gyrfalcon/kernels/cpu/not_built.txt"


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not any(map(shutil.which, ("c++", "g++", "clang++"))),
    reason="there is no C++ compiler, or this is not x86-64",
)
def test_it_holds_the_kernels_for_this_kind_of_machine(wheel: zipfile.ZipFile) -> None:
    assert LIBRARY in wheel.namelist()
    assert NOTICE not in wheel.namelist()
    assert Path(str(wheel.filename)).name.endswith("-py3-none-linux_x86_64.whl")


def test_without_a_compiler_it_is_built_without_the_kernels_and_says_why(tmp_path: Path) -> None:
    made, said = built_from_copy(tmp_path, CXX="/nowhere/c++")
    reason = "the compiler that CXX names, `/nowhere/c++`, is not there"
    assert LIBRARY not in made.namelist()
    assert made.read(NOTICE).decode() in {f"{reason}\n", f"they are written for Linux on x86-64, and {_machine()}\n"}
    assert "gyrfalcon: plain PyTorch will run instead" in said
    assert Path(str(made.filename)).name.endswith("-py3-none-any.whl")


def test_where_compiling_fails_it_is_built_without_the_kernels_and_says_what_failed(tmp_path: Path) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'error: no such thing' >&2\ncase $* in *--version*) exit 0;; esac\nexit 1\n")
    broken.chmod(0o755)
    made, said = built_from_copy(tmp_path, CXX=str(broken))
    assert LIBRARY not in made.namelist()
    assert NOTICE in made.namelist()
    if platform.machine() == "x86_64":
        assert f"does not compile with {broken}" in made.read(NOTICE).decode()
        assert "error: no such thing" in said


def _machine() -> str:
    return f"this is {sys.platform} on {platform.machine()}"


def test_it_declares_torch_as_a_range(wheel: zipfile.ZipFile) -> None:
    metadata = wheel.read(f"gyrfalcon-{__version__}.dist-info/METADATA").decode()
    assert "Requires-Dist: torch<3,>=2.11" in metadata.splitlines()
    assert "License-Expression: Apache-2.0" in metadata.splitlines()
    assert "Requires-Python: >=3.11" in metadata.splitlines()
