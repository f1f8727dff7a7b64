"""Engine cores for tests that start processes: light to import in the child."""

from __future__ import annotations

import time
from collections.abc import Callable

from gyrfalcon.engine.core import CoreLimits, EngineCore
from gyrfalcon.engine.interface import EngineRequest
from gyrfalcon.testing.executor import FakeExecutor


def request(request_id: str, prompt_ids: tuple[int, ...], max_new_tokens: int = 6, **others: object) -> EngineRequest:
    return EngineRequest(request_id=request_id, prompt_ids=prompt_ids, max_new_tokens=max_new_tokens, **others)


def build_core(on_progress: Callable[[int, int], None]) -> EngineCore:
    """A core whose steps take a hundredth of a second."""
    return EngineCore(FakeExecutor(num_blocks=400, before_step=lambda plan: time.sleep(0.01)), CoreLimits())


def build_slow_core(on_progress: Callable[[int, int], None]) -> EngineCore:
    """A core whose first step takes a minute."""
    return EngineCore(FakeExecutor(before_step=lambda plan: time.sleep(60)), CoreLimits())
