"""Checkpoints for parity tests, each written once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gyrfalcon.testing.checkpoints import cached_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """checkpoint(form, seed=0, trained=False): the folder of a tiny checkpoint."""
    cache = tmp_path_factory.mktemp("checkpoints")

    def get(form: str, *, seed: int = 0, trained: bool = False) -> Path:
        return cached_checkpoint(cache, form, seed=seed, trained=trained)

    return get
