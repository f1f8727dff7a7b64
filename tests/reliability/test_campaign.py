"""The long trials in a form of seconds (7.5, 7.8): a real server, its engine in a process of its own."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest

from gyrfalcon.testing.server import running_server
from tests.reliability.campaign import (
    MOST_GROWTH_BYTES,
    PATIENT,
    Watched,
    disconnects,
    is_steady,
    is_whole,
    payload,
    soak,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Watched]:
    with running_server("--log-level", "warning", *PATIENT) as process:
        yield Watched(process)


async def test_7_8_nothing_is_lost_or_altered_in_mixed_traffic(server: Watched) -> None:
    figures, _ = await soak(server, argparse.Namespace(seconds=4.0, clients=16, seed=1))
    assert figures["requests"] >= 20
    assert figures["lost"] == figures["altered"] == 0
    assert sum(figures["memory_growth_bytes"].values()) <= MOST_GROWTH_BYTES
    assert figures["files_left"] <= 1
    assert figures["idle_after_s"] < 5


async def test_7_5_disconnects_leave_nothing_behind(server: Watched) -> None:
    figures, is_right = await disconnects(server, argparse.Namespace(count=150, clients=16, seed=1))
    assert is_right, figures


def test_7_8_growth_is_bounded_by_request_and_in_all() -> None:
    assert is_steady({"front": 3000, "engine": -1000}, 2)
    assert not is_steady({"front": 3000, "engine": 0}, 2)
    assert not is_steady({"front": 20 * 2**20, "engine": 13 * 2**20}, 10**6)


def test_7_8_an_answer_with_a_token_too_few_is_noticed() -> None:
    def answer(num_said: int) -> bytes:
        tokens = b'[{"id": 1}, {"id": 2}]'
        sequence = b'"tokens": %b, "generated_tokens": %d, "finish_reason": "length"' % (tokens, num_said)
        return b'{"details": {%b, "best_of_sequences": [{%b}]}}' % (sequence, sequence)

    assert is_whole(answer(2))
    assert not is_whole(answer(3))


def test_7_8_an_answer_is_read_without_the_borders_of_its_chunks() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert payload(head + b"6\r\nhello \r\n8\r\n: ping\n\n\r\n5\r\nworld\r\n0\r\n\r\n") == b"hello world"
    with pytest.raises(ValueError, match="last chunk"):
        payload(head + b"6\r\nhello \r\n")
