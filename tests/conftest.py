"""What holds for every test: no network, one thread for each operation, no settings from the outside."""

from __future__ import annotations

import os

# Read when the libraries are imported, so set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import settings as hypothesis_settings

from gyrfalcon.config import CONFIG_VARIABLE, DEBUG_VARIABLE, OPTIONS

# A shared machine makes single examples slow now and then; pytest's own timeout ends a test that hangs.
hypothesis_settings.register_profile("gyrfalcon", deadline=None)
hypothesis_settings.load_profile("gyrfalcon")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {name for option in OPTIONS for name in option.variables}
    names |= {name for name in os.environ if name.startswith("GYRFALCON_")}
    for name in names | {CONFIG_VARIABLE, DEBUG_VARIABLE}:
        monkeypatch.delenv(name, raising=False)
