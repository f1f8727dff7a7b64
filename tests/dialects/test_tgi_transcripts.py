"""Recorded requests and answers of text-generation-inference's dialect, replayed against a running server.

tools/tgi_transcripts.py says what a transcript holds, and records them anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gyrfalcon.testing.server import ServerProcess, running_server
from tools.tgi_transcripts import SERVER_ARGUMENTS, differences, exchange, load, transcripts

ANSWER = {"status": 200, "headers": {"x-total-time": None}, "body": {"logprob": -1.25, "seed": 7, "tokens": [1, 2]}}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running_server(*SERVER_ARGUMENTS) as running:
        yield running


@pytest.mark.parametrize("path", transcripts(), ids=lambda path: path.stem)
def test_the_server_says_what_was_recorded(server: ServerProcess, path: Path) -> None:
    transcript = load(path)
    assert list(differences(transcript, exchange(server, transcript["request"]))) == []


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({"logprob": -1.25 + 5e-5, "seed": 7, "tokens": [1, 2]}, []),
        ({"logprob": -1.25, "seed": 8, "tokens": [1, 2]}, []),
        ({"logprob": -1.26, "seed": 7, "tokens": [1, 2]}, ["body.logprob: -1.26, not -1.25"]),
        ({"logprob": -1, "seed": 7, "tokens": [1, 2]}, ["body.logprob: -1, not -1.25"]),
        ({"logprob": -1.25, "seed": None, "tokens": [1, 2]}, ["body.seed: None is not of the type of 7"]),
        ({"logprob": -1.25, "seed": 7, "tokens": [1, 3]}, ["body.tokens.1: 3, not 2"]),
        ({"logprob": -1.25, "seed": 7, "tokens": [1]}, ["body.tokens: 1 items, not 2"]),
        ({"logprob": -1.25, "seed": 7, "tokens": [1, True]}, ["body.tokens.1: True, not 2"]),
        ({"logprob": -1.25, "seed": 7}, ["body.tokens: missing"]),
        ({"logprob": -1.25, "seed": 7, "tokens": [1, 2], "more": 1}, ["body.more: new"]),
    ],
)
def test_a_difference_is_found_unless_it_is_small_or_volatile(body: Any, found: list[str]) -> None:
    transcript = {"response": ANSWER, "volatile": ["body.seed"]}
    assert list(differences(transcript, ANSWER | {"body": body})) == found


def test_a_header_that_comes_or_goes_is_a_difference() -> None:
    said = ANSWER | {"headers": {"x-more": "1"}}
    assert list(differences({"response": ANSWER}, said)) == ["headers.x-more: new", "headers.x-total-time: missing"]
