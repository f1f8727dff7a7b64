"""The loop that owns a core: takes commands in, steps while there is work, reports after every step."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable

from gyrfalcon.engine.core import EngineCore, StepOutcome
from gyrfalcon.engine.messages import Abort, Command, EndChoice, Report, Stop, Submit

logger = logging.getLogger(__name__)


def run_loop(core: EngineCore, inbox: queue.SimpleQueue[Command], report: Callable[[Report], None]) -> None:
    """Run until Stop. Commands take effect between steps; with nothing to do the loop sleeps on the inbox."""
    while True:
        outcome = StepOutcome()
        if not _take_commands(core, inbox, outcome):
            return
        if core.has_work:
            core.step(outcome)
        report(
            Report(
                events=outcome.events,
                finished=outcome.finished,
                failures=outcome.failures,
                refusals=outcome.refusals,
                overdue=outcome.overdue,
                stats=core.stats(),
                step=outcome.step,
            )
        )


def _take_commands(core: EngineCore, inbox: queue.SimpleQueue[Command], outcome: StepOutcome) -> bool:
    """Apply every command that waits, blocking for one when there is no work; False on Stop."""
    may_wait = not core.has_work
    while True:
        try:
            command = inbox.get(block=may_wait)
        except queue.Empty:
            return True
        may_wait = False
        match command:
            case Submit(request):
                try:
                    core.submit(request, outcome)
                except Exception:
                    logger.exception("request %s could not be taken in", request.request_id)
                    outcome.failures[request.request_id] = "the engine could not take this request in"
            case Abort(request_id):
                core.abort(request_id)
            case EndChoice(request_id, choice):
                core.end_choice(request_id, choice, outcome)
            case Stop():
                return False
