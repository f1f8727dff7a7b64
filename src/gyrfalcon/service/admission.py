"""Who may come in, and who goes next: a bound on what is in work, a bounded queue, a time-out for those who wait.

A request passes two doors. `Admission.permit` counts sequences before anything is computed for the request, and turns
it away at once where there are too many. `TurnQueue.turn` holds it, first come first served, until the engine has room
for it; from then on it is never dropped for load.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from gyrfalcon.errors import Overloaded, QueueTimeout
from gyrfalcon.service.interface import Caller

# The engine over-commits its cache this far: most requests end before their longest possible length.
CACHE_OVERCOMMIT = 2
# Of the batch's rows, what part more is handed over, so that a row that ends has a successor in the very next step.
LOOKAHEAD_PART = 8
# Where no bound on queued tokens is set: as many cachefuls.
QUEUED_CACHEFULS = 4


class Admission:
    """Counts the sequences that are in work at the same time, waiting or running, and turns away what exceeds them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken = 0

    @contextmanager
    def permit(self, num_sequences: int) -> Iterator[None]:
        """Hold room for this many sequences. Raises Overloaded at once where there is none."""
        if self._taken + num_sequences > self._most:
            raise Overloaded(f"model is overloaded: at most {self._most} sequences run at the same time")
        self._taken += num_sequences
        try:
            yield
        finally:
            self._taken -= num_sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """max_sequences, max_tokens: of the requests handed to the engine at the same time; prompt and new tokens of all
    their sequences. max_queued_tokens: prompt tokens of those that wait. timeout_s: how long one may wait.
    """

    max_sequences: int
    max_tokens: int
    max_queued_tokens: int
    timeout_s: float


@dataclass(slots=True)
class _Waiting:
    """A request in the queue."""

    num_sequences: int
    num_tokens: int
    may_go: asyncio.Future[None]


class TurnQueue:
    """The requests of one model that the engine has no room for yet, in order of arrival."""

    def __init__(
        self, limits: QueueLimits, *, on_depth: Callable[[int, int], None] = lambda requests, tokens: None
    ) -> None:
        """on_depth: told how many requests and prompt tokens wait, whenever that changes."""
        self._limits = limits
        self._on_depth = on_depth
        self._waiting: deque[_Waiting] = deque()
        self._queued_tokens = 0
        self._queued_by_caller: Counter[str] = Counter()
        self._sequences = 0
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def turn(
        self, caller: Caller, *, num_sequences: int, num_prompt_tokens: int, max_new_tokens: int
    ) -> AsyncIterator[float]:
        """Wait for the request's turn and hold its room in the engine; yields the seconds waited.

        Raises Overloaded at once where the queue holds too many tokens, QueueTimeout after waiting for too long.
        """
        num_tokens = num_sequences * (num_prompt_tokens + max_new_tokens)
        waited_s = 0.0
        if self._waiting or not self._has_room(num_sequences, num_tokens):
            started = time.perf_counter()
            await self._wait(caller, num_sequences, num_tokens, num_prompt_tokens)
            waited_s = time.perf_counter() - started
        else:
            self._take(num_sequences, num_tokens)
        try:
            yield waited_s
        finally:
            self._give_back(num_sequences, num_tokens)

    async def _wait(self, caller: Caller, num_sequences: int, num_tokens: int, num_prompt_tokens: int) -> None:
        """Return holding the request's room."""
        self._check_tokens(caller, num_prompt_tokens)
        entry = _Waiting(num_sequences, num_tokens, asyncio.get_running_loop().create_future())
        self._waiting.append(entry)
        self._queue(caller, num_prompt_tokens)
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                await entry.may_go
        except BaseException as error:
            if entry.may_go.done() and not entry.may_go.cancelled():  # its turn came in the same moment
                self._give_back(num_sequences, num_tokens)
            else:
                self._waiting.remove(entry)
                self._let_go()  # what stood behind it may be smaller
            if isinstance(error, TimeoutError):
                raise QueueTimeout(
                    f"model is overloaded: the request waited {self._limits.timeout_s:g} seconds for its turn"
                ) from None
            raise
        finally:
            self._queue(caller, -num_prompt_tokens)

    def _check_tokens(self, caller: Caller, num_prompt_tokens: int) -> None:
        most = self._limits.max_queued_tokens
        if self._queued_tokens and self._queued_tokens + num_prompt_tokens > most:
            raise Overloaded(f"model is overloaded: at most {most} prompt tokens wait at the same time")
        most_of_caller, queued = caller.max_queued_tokens, self._queued_by_caller[caller.name]
        if most_of_caller is not None and queued + num_prompt_tokens > most_of_caller:
            raise Overloaded(f"this API key may have {most_of_caller} prompt tokens waiting at the same time")

    def _queue(self, caller: Caller, num_prompt_tokens: int) -> None:
        self._queued_tokens += num_prompt_tokens
        self._queued_by_caller[caller.name] += num_prompt_tokens
        if not self._queued_by_caller[caller.name]:
            del self._queued_by_caller[caller.name]
        self._on_depth(len(self._waiting), self._queued_tokens)

    def _has_room(self, num_sequences: int, num_tokens: int) -> bool:
        """Whether the engine can take this on; when it has nothing to do it takes whatever comes."""
        fits = (
            self._sequences + num_sequences <= self._limits.max_sequences
            and self._tokens + num_tokens <= self._limits.max_tokens
        )
        return fits or self._sequences == 0

    def _take(self, num_sequences: int, num_tokens: int) -> None:
        self._sequences += num_sequences
        self._tokens += num_tokens

    def _give_back(self, num_sequences: int, num_tokens: int) -> None:
        self._sequences -= num_sequences
        self._tokens -= num_tokens
        self._let_go()

    def _let_go(self) -> None:
        """Hand their room to those whose turn has come: strictly in order, so that nobody starves."""
        while self._waiting:
            first = self._waiting[0]
            # One that has just been cancelled is about to leave by itself, and then lets the next one go.
            if first.may_go.done() or not self._has_room(first.num_sequences, first.num_tokens):
                return
            self._waiting.popleft()
            self._take(first.num_sequences, first.num_tokens)
            first.may_go.set_result(None)
