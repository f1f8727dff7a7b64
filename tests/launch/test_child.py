"""How the engine's process makes its core."""

from __future__ import annotations

import gc

import pytest

from gyrfalcon.config import Settings
from gyrfalcon.launch import child
from gyrfalcon.presets import bundled_folder


def test_garbage_is_looked_for_again_once_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    # What a process sets for itself would stay for the tests after this one.
    monkeypatch.setattr(child, "setup_logging", lambda *settings: None)
    monkeypatch.setenv("GOMP_SPINCOUNT", "2000")
    settings = Settings(device="cpu", packed_cache="off", max_batch_total_tokens=256, num_threads=1)
    was_enabled: list[bool] = []
    core = child.CoreRecipe(settings, bundled_folder())(lambda done, total: was_enabled.append(gc.isenabled()))
    core.close()
    assert was_enabled
    assert not any(was_enabled)
    assert gc.isenabled()
