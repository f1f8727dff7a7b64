"""What the two sides of an engine say to each other; plain values that a pipe can carry."""

from __future__ import annotations

import msgspec

from gyrfalcon.engine.interface import EngineEvent, EngineFacts, EngineRequest, EngineStats, StepReading


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """Begin a request."""

    request: EngineRequest


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Nobody listens to this request any more."""

    request_id: str


class EndChoice(msgspec.Struct, frozen=True, tag="end_choice"):
    """One choice needs no more tokens."""

    request_id: str
    choice: int


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """End the loop; what still runs is dropped."""


Command = Submit | Abort | EndChoice | Stop


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """How much of the weights has been read, in bytes."""

    done: int
    total: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The engine takes requests from now on."""

    facts: EngineFacts


class StartFailed(msgspec.Struct, frozen=True, tag="start_failed"):
    """The engine could not start; `message` is for the operator."""

    message: str


class Report(msgspec.Struct, frozen=True, tag="report"):
    """What one step brought, for all requests together: one message and one wake-up a step."""

    events: dict[str, list[EngineEvent]]
    finished: list[str]
    failures: dict[str, str]
    refusals: dict[str, str]
    overdue: dict[str, str]
    stats: EngineStats
    step: StepReading | None = None  # None when there was nothing to compute


Notice = Loading | Ready | StartFailed | Report
