"""Faults on purpose, for tests: a token id that makes the step or the logits go wrong. Off unless two variables ask.

`GYRFALCON_FAULT=POINT:ACTION:TOKEN` is heeded only beside `GYRFALCON_TESTING=1`. A token marks whom the fault meets,
as the device side knows nothing of requests.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gyrfalcon.errors import SettingsError

if TYPE_CHECKING:  # settings know the variables' names, and are read without numpy
    import numpy as np
    import numpy.typing as npt

logger = logging.getLogger(__name__)

FAULT_VARIABLE = "GYRFALCON_FAULT"
TESTING_VARIABLE = "GYRFALCON_TESTING"
KINDS = ("step:raise", "step:oom", "step:hang", "logits:nan")


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong in the steps that run a token.

    kind: "step:raise" and "step:oom" fail the step by an error or for want of memory, "step:hang" never ends it;
    "logits:nan" spoils the logits of what comes after the token.
    """

    kind: str
    token_id: int

    def strike(self, token_ids_T: npt.NDArray[np.int32]) -> None:
        """Fail or hang, if the step that runs these tokens is to."""
        if self.kind == "logits:nan" or self.token_id not in token_ids_T:
            return
        logger.warning("%s is asked for by %s", self.kind, FAULT_VARIABLE)
        if self.kind == "step:raise":
            raise RuntimeError("a step is made to fail")
        if self.kind == "step:oom":
            raise MemoryError("a step is made to lack memory")
        while True:
            time.sleep(1)

    def spoils(self, token_ids_N: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        """After which of these tokens the logits are to be NaN."""
        spoilt_N: npt.NDArray[np.bool_] = token_ids_N == self.token_id
        return spoilt_N & (self.kind == "logits:nan")


def planned_fault(environ: Mapping[str, str]) -> Fault | None:
    """The fault that the environment asks for. Raises SettingsError where a test misspells it."""
    text = environ.get(FAULT_VARIABLE, "")
    if not text:
        return None
    if environ.get(TESTING_VARIABLE) != "1":
        logger.warning("%s is ignored: it takes effect in tests only", FAULT_VARIABLE)
        return None
    kind, _, token = text.rpartition(":")
    if kind not in KINDS or not token.isascii() or not token.isdigit():
        raise SettingsError(FAULT_VARIABLE, f"`{text}` is not one of {', '.join(KINDS)} with `:TOKEN`, a token's id")
    return Fault(kind, int(token))
