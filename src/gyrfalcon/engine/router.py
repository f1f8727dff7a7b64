"""The listening side of an engine: hands each report's events to the requests that wait for them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable

from gyrfalcon.engine.interface import EngineEvent, EngineRequest
from gyrfalcon.engine.messages import Abort, Command, Report, Submit
from gyrfalcon.errors import GenerationFailed, InvalidRequest, QueueTimeout


class Mailbox:
    """Events of one request that its reader has not taken yet.

    Bounded by the request itself: never more than its choices times its `max_new_tokens`.
    """

    __slots__ = ("_error", "_events", "_finished", "_wake")

    def __init__(self) -> None:
        self._events: list[EngineEvent] = []
        self._finished = False
        self._error: Exception | None = None
        self._wake = asyncio.Event()

    def put(self, events: list[EngineEvent]) -> None:
        self._events.extend(events)
        self._wake.set()

    def finish(self, error: Exception | None = None) -> None:
        self._finished = True
        self._error = error
        self._wake.set()

    async def take(self) -> list[EngineEvent]:
        """All events that wait, at least one; an empty list once the request has finished. Raises its failure."""
        while not self._events and not self._finished:
            self._wake.clear()
            await self._wake.wait()
        if not self._events and self._error is not None:
            raise self._error
        events, self._events = self._events, []
        return events

    @property
    def is_finished(self) -> bool:
        return self._finished


class EventRouter:
    """The mailboxes of the live requests. Used from one event loop only."""

    def __init__(self) -> None:
        self._mailboxes: dict[str, Mailbox] = {}

    @property
    def awaits_events(self) -> bool:
        """Whether a request's end has not come yet; one whose reader is slow may be over all the same."""
        return any(not mailbox.is_finished for mailbox in self._mailboxes.values())

    async def exchange(
        self, request: EngineRequest, send: Callable[[Command], None]
    ) -> AsyncGenerator[list[EngineEvent], None]:
        """Submit a request and yield its events; leaving early sends its abort."""
        mailbox = self._mailboxes[request.request_id] = Mailbox()
        try:
            send(Submit(request))
            while events := await mailbox.take():
                yield events
        finally:
            del self._mailboxes[request.request_id]
            if not mailbox.is_finished:
                with contextlib.suppress(ConnectionError):  # a dead engine has nothing left to abort
                    send(Abort(request.request_id))

    def deliver(self, report: Report) -> None:
        for request_id, events in report.events.items():
            if mailbox := self._mailboxes.get(request_id):
                mailbox.put(events)
        for request_id in report.finished:
            self._finish(request_id)
        for request_id, message in report.failures.items():
            self._finish(request_id, GenerationFailed(message))
        for request_id, message in report.refusals.items():
            self._finish(request_id, InvalidRequest("parameters", message))
        for request_id, message in report.overdue.items():
            self._finish(request_id, QueueTimeout(message))

    def _finish(self, request_id: str, error: Exception | None = None) -> None:
        if mailbox := self._mailboxes.get(request_id):
            mailbox.finish(error)

    def fail_all(self, error: Exception) -> None:
        """End every open request with this error, after the events it already has."""
        for mailbox in self._mailboxes.values():
            mailbox.finish(error)
