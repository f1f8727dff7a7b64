"""Who may come in, and who goes next: a bound on what is in work, a bounded queue, a time-out for those who wait.

A request passes two doors. `Admission.permit` counts sequences before anything is computed for the request, and turns
it away at once where there are too many. `TurnQueue.turn` holds it, first come first served, until the engine has room
for it; from then on it is never dropped for load. Both say beforehand whether they would turn anyone away, so that a
crowd costs little, and `RefusalLog` keeps it from filling the log.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from gyrfalcon.errors import Overloaded, QueueTimeout
from gyrfalcon.service.interface import Caller

logger = logging.getLogger(__name__)

# The engine over-commits its cache this far: most requests end before their longest possible length.
CACHE_OVERCOMMIT = 2
# Of the batch's rows, what part more is handed over, so that a row that ends has a successor in the very next step.
LOOKAHEAD_PART = 8
# Where no bound on queued tokens is set: as many cachefuls.
QUEUED_CACHEFULS = 4
# Requests turned away that have a line of their own in the log, of those of a second.
REFUSAL_LINES_PER_S = 10
# After a request was turned away: for how long nobody else comes to wait.
CROWDED_S = 1.0


class Admission:
    """Counts the sequences that are in work at the same time, waiting or running, and turns away what exceeds them.

    Waiting is for moments in which more come than go. While more come all the time it has no use: each place that is
    left is taken at once, and all that a long queue does is to make everyone wait for as long as it is.
    """

    def __init__(self, most: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._taken = 0
        self._clock = clock
        self._crowded_until = -math.inf

    def refusal(self, *, would_wait: bool) -> Overloaded | None:
        """Why a request may not come in now, however small it is. would_wait: whether it could not begin at once."""
        now = self._clock()
        if self._taken >= self._most:
            refusal = self._overloaded()
        elif would_wait and now < self._crowded_until:
            refusal = Overloaded("model is overloaded: the batch is full, and others have just been turned away")
        else:
            return None
        self._crowded_until = now + CROWDED_S
        return refusal

    @contextmanager
    def permit(self, num_sequences: int) -> Iterator[None]:
        """Hold room for this many sequences. Raises Overloaded at once where there is none."""
        if self._taken + num_sequences > self._most:
            self._crowded_until = self._clock() + CROWDED_S
            raise self._overloaded()
        self._taken += num_sequences
        try:
            yield
        finally:
            self._taken -= num_sequences

    def _overloaded(self) -> Overloaded:
        return Overloaded(f"model is overloaded: at most {self._most} sequences run at the same time")


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """max_sequences, max_tokens: of the requests handed to the engine at the same time; prompt and new tokens of all
    their sequences. batch_size: sequences that it computes together; the others wait there. max_queued_tokens: prompt
    tokens of those that wait here. timeout_s: how long one may wait.
    """

    max_sequences: int
    max_tokens: int
    batch_size: int
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

    @property
    def is_busy(self) -> bool:
        """Whether a request that comes now would wait, here or for a row of the batch."""
        return bool(self._waiting) or self._sequences >= self._limits.batch_size

    def refusal(self) -> Overloaded | None:
        """What `turn` would raise now even for a prompt of a single token."""
        return self._overloaded() if self._queued_tokens >= self._limits.max_queued_tokens else None

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
        if self._queued_tokens and self._queued_tokens + num_prompt_tokens > self._limits.max_queued_tokens:
            raise self._overloaded()
        most_of_caller, queued = caller.max_queued_tokens, self._queued_by_caller[caller.name]
        if most_of_caller is not None and queued + num_prompt_tokens > most_of_caller:
            raise Overloaded(f"this API key may have {most_of_caller} prompt tokens waiting at the same time")

    def _overloaded(self) -> Overloaded:
        most = self._limits.max_queued_tokens
        return Overloaded(f"model is overloaded: at most {most} prompt tokens wait at the same time")

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


class RefusalLog:
    """Log lines of requests that were turned away: one each for a few, and one a second for all others of a key.

    They come when there is too much to do already, in any number.
    """

    def __init__(self) -> None:
        self._num_lines = 0  # in this second
        self._others: Counter[str] = Counter()  # by the caller's name
        self._end_of_second: asyncio.TimerHandle | None = None

    def add(self, caller: Caller, write_line: Callable[[], None]) -> None:
        """Count a request that was turned away just now; write its line if it is to have one."""
        if self._end_of_second is None:
            self._num_lines = 0
            self._end_of_second = asyncio.get_running_loop().call_later(1.0, self.flush)
        if self._num_lines < REFUSAL_LINES_PER_S:
            self._num_lines += 1
            write_line()
        else:
            self._others[caller.name] += 1

    def flush(self) -> None:
        """End the second."""
        if self._end_of_second is not None:
            self._end_of_second.cancel()
            self._end_of_second = None
        for name, count in self._others.items():
            shown = {"outcome": "overloaded", "requests": count} | ({"api_key": name} if name else {})
            logger.info("more requests turned away", extra=shown)
        self._others.clear()
