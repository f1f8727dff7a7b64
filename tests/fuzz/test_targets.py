"""The targets of the fuzzer in a short form that always does the same; and what it has found so far."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.__main__ import NAMES
from tests.fuzz.strategies import inputs
from tests.fuzz.targets import TARGETS

NUM_INPUTS = {"body": 300}  # a whole application each; of the others more


@pytest.mark.parametrize("name", NAMES)
def test_7_4_no_input_breaks_a_promise(name: str) -> None:
    @settings(
        max_examples=NUM_INPUTS.get(name, 800),
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=inputs(TARGETS[name]))
    def run(data: bytes) -> None:
        TARGETS[name].run(data)

    run()


def test_7_4_every_target_can_be_named() -> None:
    assert set(NAMES) == set(TARGETS)
