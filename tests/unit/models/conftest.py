"""Checkpoints to load and to damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gyrfalcon.models.spec import checkpoint_tensors, read_spec
from gyrfalcon.testing.checkpoints import cached_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """checkpoint(form): the folder of a tiny checkpoint, shared: not to be changed."""
    cache = tmp_path_factory.mktemp("checkpoints")
    return lambda form: cached_checkpoint(cache, form)


@pytest.fixture
def damaged(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """damaged(form): a copy of the folder, to be changed."""

    def copy(form: str) -> Path:
        return Path(shutil.copytree(checkpoint(form), tmp_path / form))

    return copy


@pytest.fixture
def zero_checkpoint(tmp_path: Path) -> Callable[[dict[str, object]], Path]:
    """zero_checkpoint(config): a folder whose weights are all zero, in bfloat16, as a sparse file of any size."""

    def write(config: dict[str, object]) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config))
        header, position = {}, 0
        for name, shape in checkpoint_tensors(read_spec(tmp_path)).items():
            end = position + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
            position = end
        text = json.dumps(header).encode()
        with (tmp_path / "model.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + position)
        return tmp_path

    return write
