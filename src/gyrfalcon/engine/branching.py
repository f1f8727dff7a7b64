"""What a group makes of the tokens drawn for it: which choices end, which go on, and what is reported.

Independent choices (best_of, n, several returned sequences) are the policy here: each choice has its own stream of
noise, and a sequence forks when the choices that shared it part.
"""

from __future__ import annotations

from dataclasses import dataclass

from gyrfalcon.engine.beams import Search
from gyrfalcon.engine.interface import EngineEvent, FinishReason, ScoreEvent, TokenEvent
from gyrfalcon.engine.sequence import Sequence, SequenceGroup


@dataclass(frozen=True, slots=True)
class Draw:
    """One token drawn for one choice; `top` as in TokenEvent."""

    choice: int
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] | None


def settle(
    group: SequenceGroup, sequence: Sequence, draws: list[Draw]
) -> tuple[list[TokenEvent], list[tuple[int, int]]]:
    """The events of one sequence's draws, and the (choice, token id) pairs that go on."""
    events, going_on = [], []
    for draw in draws:
        reason = _finish_reason(group, sequence, draw.token_id)
        events.append(TokenEvent(draw.choice, draw.token_id, draw.logprob, reason, draw.top))
        if reason is None:
            going_on.append((draw.choice, draw.token_id))
    return events, going_on


def report_search(group: SequenceGroup, search: Search) -> list[EngineEvent]:
    """All there is to say of a search that has ended: each returned sequence's score, then its tokens."""
    events: list[EngineEvent] = []
    for choice, hypothesis in enumerate(search.best(group.request.num_choices)):
        trail = list(hypothesis.trail.walk())
        events.append(ScoreEvent(choice, hypothesis.score, tuple(step.beam for step in trail)))
        for step in trail[:-1]:
            events.append(TokenEvent(choice, step.token_id, step.score))
        last = trail[-1]
        is_long = len(trail) >= group.request.max_new_tokens
        reason = FinishReason.LENGTH if is_long else FinishReason.EOS
        events.append(TokenEvent(choice, last.token_id, last.score, reason))
    return events


def _finish_reason(group: SequenceGroup, sequence: Sequence, token_id: int) -> FinishReason | None:
    # The limit is looked at first: a token that meets both ends its choice by length, as TGI reports it.
    if group.num_generated(sequence) + 1 >= group.request.max_new_tokens:
        return FinishReason.LENGTH
    if token_id in group.request.stop_token_ids:
        return FinishReason.EOS
    return None
