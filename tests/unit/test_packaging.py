"""The wheel: it holds what serving needs, and no more than a download may weigh."""

from __future__ import annotations

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
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    return zipfile.ZipFile(folder / f"gyrfalcon-{__version__}-py3-none-any.whl")


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


def test_it_declares_torch_as_a_range(wheel: zipfile.ZipFile) -> None:
    metadata = wheel.read(f"gyrfalcon-{__version__}.dist-info/METADATA").decode()
    assert "Requires-Dist: torch<3,>=2.11" in metadata.splitlines()
    assert "License-Expression: Apache-2.0" in metadata.splitlines()
    assert "Requires-Python: >=3.11" in metadata.splitlines()
