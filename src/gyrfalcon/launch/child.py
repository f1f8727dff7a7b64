"""What the front process hands to the engine's process: a recipe for the core, without the libraries it needs."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gyrfalcon.config import Settings
from gyrfalcon.engine.process import EngineChild
from gyrfalcon.telemetry import setup_logging

if TYPE_CHECKING:
    from gyrfalcon.engine.core import EngineCore


@dataclass(frozen=True, slots=True)
class CoreRecipe:
    """Builds the core where it is called. Picklable: the front process never imports torch."""

    settings: Settings
    folder: Path

    def __call__(self, on_progress: Callable[[int, int], None]) -> EngineCore:
        setup_logging(self.settings.json_output, self.settings.log_level)
        prepare()
        with _without_collections():
            from gyrfalcon.launch.device import build_core

            core = build_core(self.settings, self.folder, on_progress)
        core.warm_up()
        return core


def prepare() -> None:
    """Import what building a core takes, torch above all."""
    # Read when torch is loaded. Waiting threads give their core up soon instead of spinning for milliseconds: on a
    # machine of its own a step takes as long as before, beside one busy process half as long.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    with _without_collections():
        import gyrfalcon.launch.device  # noqa: F401


@contextmanager
def child_ahead(settings: Settings) -> Iterator[EngineChild | None]:
    """A child process that prepares itself while this one still imports and reads: both take most of a second.

    None where the engine is to run in this process.
    """
    if settings.engine != "process":
        yield None
        return
    child = EngineChild(prepare)
    try:
        yield child
    finally:
        child.end()


@contextmanager
def _without_collections() -> Iterator[None]:
    """No search for garbage while hardly any is made: it takes a tenth of the time that importing torch does."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
