"""The queue for the engine: order, bounds, time-out, and that nothing of it is lost."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gyrfalcon.errors import Overloaded, QueueTimeout
from gyrfalcon.service.admission import REFUSAL_LINES_PER_S, Admission, QueueLimits, RefusalLog, TurnQueue
from gyrfalcon.service.interface import Caller

ANYONE = Caller()
LIMITS = QueueLimits(max_sequences=4, max_tokens=100, batch_size=3, max_queued_tokens=50, timeout_s=5.0)


class Turns:
    """Requests that take their turns and hold them until told to end."""

    def __init__(self, limits: QueueLimits = LIMITS) -> None:
        self.depths: list[tuple[int, int]] = []
        self.queue = TurnQueue(limits, on_depth=lambda requests, tokens: self.depths.append((requests, tokens)))
        self.begun: list[int] = []
        self._ends: list[asyncio.Event] = []
        self.tasks: list[asyncio.Task[float]] = []

    async def add(self, sequences: int = 1, prompt: int = 5, new: int = 5, caller: Caller = ANYONE) -> int:
        number = len(self.tasks)
        end = asyncio.Event()
        self._ends.append(end)

        async def run() -> float:
            turn = self.queue.turn(caller, num_sequences=sequences, num_prompt_tokens=prompt, max_new_tokens=new)
            async with turn as waited_s:
                self.begun.append(number)
                await end.wait()
            return waited_s

        self.tasks.append(asyncio.create_task(run()))
        await self.settle()
        return number

    async def end(self, number: int) -> None:
        self._ends[number].set()
        await self.settle()

    async def cancel(self, number: int) -> None:
        self.tasks[number].cancel()
        await self.settle()

    async def settle(self) -> None:
        for _ in range(4):
            await asyncio.sleep(0)

    def failure(self, number: int) -> BaseException | None:
        return self.tasks[number].exception() if self.tasks[number].done() else None


async def test_what_fits_goes_at_once() -> None:
    turns = Turns()
    for _ in range(4):
        await turns.add()
    assert turns.begun == [0, 1, 2, 3]
    assert turns.depths == []
    await turns.end(0)
    assert turns.tasks[0].result() == 0.0


async def test_the_rest_goes_in_order_of_arrival() -> None:
    turns = Turns()
    for _ in range(8):
        await turns.add()
    assert (turns.begun, len(turns.queue)) == ([0, 1, 2, 3], 4)
    for number in (2, 0, 3):
        await turns.end(number)
    assert turns.begun == [0, 1, 2, 3, 4, 5, 6]
    await turns.end(6)
    await turns.end(1)
    assert turns.depths[-1] == (0, 0)


async def test_nobody_overtakes_one_that_does_not_fit_yet() -> None:
    turns = Turns()
    for _ in range(3):
        await turns.add()
    await turns.add(sequences=4)
    await turns.add(sequences=1)
    assert turns.begun == [0, 1, 2]
    for number in range(3):
        await turns.end(number)
    assert turns.begun == [0, 1, 2, 3]
    await turns.end(3)
    assert turns.begun == [0, 1, 2, 3, 4]


async def test_one_that_leaves_lets_those_behind_it_go() -> None:
    turns = Turns()
    await turns.add(sequences=3)
    await turns.add(sequences=4)
    await turns.add()
    await turns.cancel(1)
    assert turns.begun == [0, 2]
    assert turns.tasks[1].cancelled()


async def test_tokens_count_as_well_as_sequences() -> None:
    turns = Turns()
    await turns.add(prompt=20, new=40)
    await turns.add(prompt=20, new=30)
    assert turns.begun == [0]
    await turns.end(0)
    assert turns.begun == [0, 1]


async def test_the_largest_request_goes_when_nothing_else_runs() -> None:
    turns = Turns()
    await turns.add(sequences=9, prompt=500, new=500)
    assert turns.begun == [0]
    await turns.add()
    assert turns.begun == [0]


async def test_too_many_waiting_tokens_are_overload() -> None:
    turns = Turns()
    await turns.add(sequences=4)
    await turns.add(prompt=30)
    await turns.add(prompt=21)
    assert isinstance(turns.failure(2), Overloaded)
    assert "at most 50 prompt tokens wait" in str(turns.failure(2))
    await turns.add(prompt=20)
    assert turns.failure(3) is None
    assert turns.depths[-1] == (2, 50)


async def test_a_full_batch_makes_the_next_one_wait() -> None:
    turns = Turns()
    await turns.add(sequences=2)
    assert not turns.queue.is_busy
    await turns.add()
    assert turns.queue.is_busy  # though the engine would take one more, to have it at hand
    await turns.end(1)
    assert not turns.queue.is_busy
    await turns.add(sequences=3)
    assert turns.begun == [0, 1]
    assert turns.queue.is_busy


async def test_a_queue_that_holds_all_the_tokens_it_may_says_so_beforehand() -> None:
    turns = Turns()
    await turns.add(sequences=4)
    await turns.add(prompt=49)
    assert turns.queue.refusal() is None
    await turns.add(prompt=1)
    assert "at most 50 prompt tokens wait" in str(turns.queue.refusal())
    await turns.end(0)
    assert turns.queue.refusal() is None


async def test_a_single_prompt_may_wait_however_long_it_is() -> None:
    turns = Turns()
    await turns.add(sequences=4)
    await turns.add(prompt=60)
    assert turns.failure(1) is None


async def test_a_caller_has_a_share_of_its_own() -> None:
    turns = Turns()
    await turns.add(sequences=4)
    small, other = Caller(name="a", max_queued_tokens=10), Caller(name="b", max_queued_tokens=10)
    await turns.add(prompt=8, caller=small)
    await turns.add(prompt=3, caller=small)
    await turns.add(prompt=8, caller=other)
    assert "may have 10 prompt tokens" in str(turns.failure(2))
    assert turns.failure(3) is None
    await turns.end(0)
    await turns.end(1)
    await turns.add(sequences=3)
    await turns.add(prompt=8, caller=small)  # what no longer waits no longer counts
    assert turns.failure(5) is None


async def test_waiting_has_an_end() -> None:
    turns = Turns(QueueLimits(max_sequences=1, max_tokens=100, batch_size=1, max_queued_tokens=50, timeout_s=0.02))
    await turns.add()
    await turns.add()
    await asyncio.sleep(0.1)
    assert isinstance(turns.failure(1), QueueTimeout)
    assert "waited 0.02 seconds" in str(turns.failure(1))
    assert (len(turns.queue), turns.depths[-1]) == (0, (0, 0))
    assert turns.failure(0) is None  # what has begun goes on
    await turns.end(0)
    await turns.add()
    assert turns.begun == [0, 2]


async def test_one_whose_turn_comes_as_it_leaves_gives_it_on() -> None:
    turns = Turns(QueueLimits(max_sequences=1, max_tokens=100, batch_size=1, max_queued_tokens=50, timeout_s=5))
    await turns.add()
    await turns.add()
    await turns.add()
    turns._ends[0].set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    turns.tasks[1].cancel()  # has its turn, and does not know it yet
    await turns.settle()
    assert turns.begun[-1] == 2


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["add", "end", "cancel"]), st.integers(0, 30), st.integers(1, 4), st.integers(1, 40)),
    max_size=40,
)


@given(OPERATIONS)
@settings(max_examples=100)
def test_bounds_hold_and_everyone_gets_a_turn_in_order(
    operations: list[tuple[str, int, int, int]],
) -> None:
    async def play() -> None:
        limits = QueueLimits(max_sequences=4, max_tokens=100, batch_size=4, max_queued_tokens=10_000, timeout_s=60)
        turns, gone, sizes = Turns(limits), set[int](), list[tuple[int, int]]()
        async with AsyncExitStack():
            for kind, which, sequences, tokens in operations:
                if kind == "add":
                    sizes.append((sequences, tokens))
                    await turns.add(sequences, tokens, 0)
                elif sizes:
                    number = which % len(sizes)
                    gone.add(number)
                    await (turns.end(number) if kind == "end" else turns.cancel(number))
                running = [n for n in turns.begun if not turns.tasks[n].done()]
                taken = [sizes[n] for n in running]
                assert sum(s for s, _ in taken) <= 4
                assert len(taken) <= 1 or sum(s * t for s, t in taken) <= 100
                assert turns.begun == sorted(turns.begun)
                assert (turns.queue._sequences, turns.queue._tokens) == (
                    sum(s for s, _ in taken),
                    sum(s * t for s, t in taken),
                )
            for number in range(len(sizes)):
                await turns.end(number)
        assert all(task.done() for task in turns.tasks)
        assert (len(turns.queue), turns.queue._sequences, turns.queue._queued_tokens) == (0, 0, 0)
        assert {n for n in range(len(sizes)) if n not in gone} <= set(turns.begun)

    asyncio.run(play())


def test_permits_are_counted_in_sequences() -> None:
    admission = Admission(3)
    with admission.permit(2):
        with pytest.raises(Overloaded, match="at most 3 sequences"), admission.permit(2):
            raise AssertionError
        with admission.permit(1):
            pass
    with admission.permit(3):
        pass


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class TestRefusals:
    """What `Admission` says beforehand."""

    def test_a_full_house_refuses_whether_or_not_the_batch_is_full(self) -> None:
        admission = Admission(2)
        with admission.permit(2):
            for would_wait in (True, False):
                assert "at most 2 sequences" in str(admission.refusal(would_wait=would_wait))

    def test_a_full_batch_alone_refuses_nobody(self) -> None:
        admission = Admission(2)
        with admission.permit(1):
            assert admission.refusal(would_wait=True) is None

    def test_nobody_comes_to_wait_just_after_others_were_turned_away(self) -> None:
        clock = Clock()
        admission = Admission(2, clock=clock)
        with admission.permit(2):
            assert admission.refusal(would_wait=True)
        assert "others have just been turned away" in str(admission.refusal(would_wait=True))
        assert admission.refusal(would_wait=False) is None
        clock.now_s += 1.0
        assert admission.refusal(would_wait=True) is None

    def test_each_refusal_makes_that_last(self) -> None:
        clock = Clock()
        admission = Admission(2, clock=clock)
        with admission.permit(2):
            assert admission.refusal(would_wait=True)
        for _ in range(5):
            clock.now_s += 0.9
            assert admission.refusal(would_wait=True)

    def test_a_permit_that_is_refused_begins_it_too(self) -> None:
        admission = Admission(2)
        with admission.permit(1), pytest.raises(Overloaded), admission.permit(2):
            raise AssertionError
        assert admission.refusal(would_wait=True)


async def test_a_crowd_has_few_lines_of_its_own_and_one_that_sums_up(caplog: pytest.LogCaptureFixture) -> None:
    log, lines = RefusalLog(), list[int]()
    with caplog.at_level(logging.INFO):
        for number in range(30):
            log.add(Caller(name="one") if number % 2 else ANYONE, lambda number=number: lines.append(number))
        assert lines == list(range(REFUSAL_LINES_PER_S))
        assert caplog.records == []
        log.flush()
        log.flush()
    assert [(r.getMessage(), r.requests, getattr(r, "api_key", None)) for r in caplog.records] == [
        ("more requests turned away", 10, None),
        ("more requests turned away", 10, "one"),
    ]


async def test_each_second_has_lines_of_its_own() -> None:
    log, lines = RefusalLog(), list[int]()
    for number in range(20):
        log.add(ANYONE, lambda number=number: lines.append(number))
    await asyncio.sleep(1.05)
    log.add(ANYONE, lambda: lines.append(99))
    log.flush()
    assert lines == [*range(REFUSAL_LINES_PER_S), 99]
