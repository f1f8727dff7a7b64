"""Drives an engine core by hand: for tests that look at every step."""

from __future__ import annotations

from gyrfalcon.engine.core import EngineCore, StepOutcome
from gyrfalcon.engine.interface import EngineRequest, FinishReason, PromptEvent, ScoreEvent


class Collector:
    """Runs a core and keeps what each request was told, by request id; checks what must hold for every engine."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.tokens: dict[str, list[list[int]]] = {}  # by choice
        self.logprobs: dict[str, list[list[float]]] = {}
        self.scores: dict[str, list[float]] = {}  # of searches, by rank
        self.reasons: dict[str, dict[int, FinishReason]] = {}
        self.prompts: dict[str, PromptEvent] = {}
        self.finished: list[str] = []
        self.failures: dict[str, str] = {}
        self.overdue: dict[str, str] = {}

    def submit(self, wanted: EngineRequest) -> None:
        outcome = StepOutcome()
        self.tokens[wanted.request_id] = [[] for _ in range(wanted.num_choices)]
        self.logprobs[wanted.request_id] = [[] for _ in range(wanted.num_choices)]
        self.reasons[wanted.request_id] = {}
        self.core.submit(wanted, outcome)
        self.failures.update(outcome.failures | outcome.refusals)

    def end_choice(self, request_id: str, choice: int) -> None:
        outcome = StepOutcome()
        self.core.end_choice(request_id, choice, outcome)
        self.finished += outcome.finished

    def step(self) -> None:
        outcome = StepOutcome()
        self.core.step(outcome)
        for request_id, events in outcome.events.items():
            for event in events:
                if isinstance(event, PromptEvent):
                    assert request_id not in self.prompts
                    self.prompts[request_id] = event
                elif isinstance(event, ScoreEvent):
                    self.scores.setdefault(request_id, []).append(event.score)
                else:
                    assert request_id in self.prompts
                    assert event.choice not in self.reasons[request_id]
                    self.tokens[request_id][event.choice].append(event.token_id)
                    self.logprobs[request_id][event.choice].append(event.logprob)
                    if event.finish_reason is not None:
                        self.reasons[request_id][event.choice] = event.finish_reason
        self.finished += outcome.finished
        self.failures.update(outcome.failures | outcome.refusals)
        self.overdue.update(outcome.overdue)

    def run(self, most_steps: int = 2000) -> None:
        """Step until nothing is left to do."""
        for _ in range(most_steps):
            if not self.core.has_work:
                return
            self.step()
        raise AssertionError("the engine did not come to rest")
