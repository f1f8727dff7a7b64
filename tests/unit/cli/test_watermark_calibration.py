"""`gyrfalcon watermark-calibrate`: rates from a service that writes marked and unmarked text on demand."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from gyrfalcon.cli.main import app
from gyrfalcon.cli.watermark_calibration import wilson
from gyrfalcon.config import Settings
from gyrfalcon.errors import SettingsError
from gyrfalcon.service.interface import (
    Choice,
    Completion,
    DetectCall,
    Detection,
    FinishReason,
    GenerateCall,
    GeneratedToken,
    TextSpan,
    Timings,
)
from gyrfalcon.service.tokenizer import TextTokenizer, load_tokenizer
from gyrfalcon.splitmix import are_green
from gyrfalcon.testing.engine import FakeEngine
from gyrfalcon.testing.text import text_service, write_tokenizer


class MarkingService:
    """Writes random words of the vocabulary, green ones where a watermark is asked for, and detects for real."""

    def __init__(self, folder: Path) -> None:
        self.calls: list[GenerateCall] = []
        self.detections: list[DetectCall] = []
        self.settings: Settings | None = None
        self._real, _ = text_service(FakeEngine(), folder)
        self._tokenizer: TextTokenizer = load_tokenizer(folder)
        words = {id_: self._tokenizer.token_text(id_) for id_ in range(260, 400)}
        # Those that are read back as they were written.
        self._words = [id_ for id_, text in words.items() if text[:1] == " " and self._tokenizer.encode(text) == [id_]]

    async def complete(self, call: GenerateCall) -> Completion:
        self.calls.append(call)
        rng, ids = random.Random(call.seed), [self._words[0]]
        while len(ids) < (call.max_new_tokens or 0):
            id_ = rng.choice(self._words)
            if not call.watermark or are_green(15485863, 0.5, np.array([ids[-1]]), np.array([id_]))[0]:
                ids.append(id_)
        tokens = tuple(GeneratedToken(id_, self._tokenizer.token_text(id_), -1.0, False) for id_ in ids)
        choice = Choice(0, self._tokenizer.decode(ids), FinishReason.LENGTH, tokens, None)
        return Completion("id", "tiny", (choice,), 1, None, Timings(0, 0, 0, 0))

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> tuple[TextSpan, ...]:
        return await self._real.tokenize(text, add_special_tokens=add_special_tokens)

    async def detect(self, call: DetectCall) -> Detection:
        self.detections.append(call)
        return await self._real.detect(call)

    @asynccontextmanager
    async def open(
        self, settings: Settings, *, on_progress: Callable[[int, int], None]
    ) -> AsyncIterator[MarkingService]:
        self.settings = settings
        yield self


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MarkingService:
    from gyrfalcon.launch import serving

    marking = MarkingService(write_tokenizer(tmp_path))
    monkeypatch.setattr(serving, "open_text_service", marking.open)
    return marking


@pytest.fixture
def words(tmp_path: Path) -> str:
    """A file of ordinary words in no order: much sooner read than the manual."""
    file = tmp_path / "words.txt"
    file.write_text(" ".join(random.Random(1).choices("the falcon flies over hills and people look up".split(), k=600)))
    return str(file)


def calibrate(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["watermark-calibrate", "--json", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def rates(result: dict[str, Any], text: str, key: str) -> dict[int, list[tuple[int, int]]]:
    return {
        row["num_tokens"]: [(rate["found"], rate["tried"]) for rate in row["rates"]]
        for row in result["rows"]
        if (row["text"], row["key"]) == (text, key)
    }


def test_marked_texts_are_found_once_they_are_long_enough_and_others_are_not(service: MarkingService) -> None:
    result = calibrate("--texts", "6", "--lengths", "10,40", "--alphas", "0.01,0.0001", "--random-keys", "40")
    assert rates(result, "marked", "server") == {10: [(6, 6), (0, 6)], 40: [(6, 6), (6, 6)]}
    for text in ("unmarked", "ordinary"):
        assert {tried for row in rates(result, text, "random").values() for _, tried in row} == {240}
        assert all(found <= 12 for found, _ in (row[0] for row in rates(result, text, "random").values()))
        assert all(found <= 1 for found, _ in (row[1] for row in rates(result, text, "random").values()))
    assert "random" not in {row["key"] for row in result["rows"] if row["text"] == "marked"}
    marked = next(row for row in result["rows"] if row["text"] == "marked" and row["num_tokens"] == 40)
    assert marked["mean_green_fraction"] == 1.0


def test_the_model_is_asked_for_texts_of_exactly_the_longest_length(service: MarkingService, words: str) -> None:
    calibrate(
        "--texts",
        "3",
        "--lengths",
        "5,20",
        "--random-keys",
        "0",
        "--temperature",
        "0.7",
        "--seed",
        "4",
        "--ordinary",
        words,
    )
    assert len(service.calls) == 6
    assert {(call.max_new_tokens, call.min_new_tokens) for call in service.calls} == {(20, 20)}
    assert {(call.do_sample, call.temperature) for call in service.calls} == {(True, 0.7)}
    assert [call.watermark for call in service.calls] == [True] * 3 + [False] * 3
    assert len({call.seed for call in service.calls}) == 6
    assert service.settings is not None
    assert service.settings.engine == "local"


def test_temperature_zero_is_greedy(service: MarkingService, words: str) -> None:
    calibrate("--texts", "2", "--lengths", "5", "--random-keys", "0", "--temperature", "0", "--ordinary", words)
    assert {(call.do_sample, call.temperature) for call in service.calls} == {(False, None)}


def test_prompts_and_ordinary_text_may_be_given(service: MarkingService, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("one\n\ntwo\n")
    (tmp_path / "text").write_text("the falcon flies over the hills " * 20)
    files = ("--prompts", str(tmp_path / "prompts"), "--ordinary", str(tmp_path / "text"))
    calibrate("--texts", "4", "--lengths", "5", "--random-keys", "0", *files)
    assert sorted(str(call.prompt) for call in service.calls) == ["one"] * 4 + ["two"] * 4
    ordinary = [str(call.text) for call in service.detections[-4:]]
    assert all(text in "the falcon flies over the hills " * 20 for text in ordinary)


def test_random_keys_are_new_for_every_text_and_the_same_for_the_same_seed(service: MarkingService, words: str) -> None:
    arguments = ("--texts", "2", "--lengths", "5", "--random-keys", "20", "--seed", "9", "--ordinary", words)
    assert calibrate(*arguments) == calibrate(*arguments)
    half = len(service.detections) // 2
    drawn = [key for call in service.detections[:half] for key in call.keys or ()]
    assert len(drawn) == len(set(drawn)) == 2 * 2 * 20
    assert drawn == [key for call in service.detections[half:] for key in call.keys or ()]


def test_the_table_shows_rates_with_intervals(service: MarkingService, words: str) -> None:
    done = CliRunner().invoke(
        app, f"watermark-calibrate --texts 4 --lengths 30 --random-keys 0 --ordinary {words}".split()
    )
    assert "eyas, temperature 1, gamma 0.5, delta 2; rates in % with 95 % intervals" in done.stdout
    line = next(line for line in done.stdout.splitlines() if "marked" in line)
    assert "100 (51 to 100)" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--lengths 25,x", "--lengths: `25,x` is not a list of whole numbers from 2 up"),
        ("--lengths 1", "--lengths: `1` is not a list of whole numbers from 2 up"),
        ("--alphas 0", "--alphas: `0` is not a list of numbers above 0 and below 1"),
        ("--alphas 0.1,nan", "--alphas: `0.1,nan` is not a list of numbers above 0 and below 1"),
        ("--temperature inf", "--temperature: `inf` is not a finite number"),
        ("--prompts /missing", "--prompts: `/missing` cannot be read"),
        ("--prompts /dev/null", "--prompts: `/dev/null` holds no prompt"),
        ("--ordinary /dev/null", "--ordinary: the text has 0 tokens; 100 pieces of 200 are wanted"),
    ],
)
def test_wrong_options_are_named(service: MarkingService, arguments: str, message: str) -> None:
    done = CliRunner().invoke(app, ["watermark-calibrate", *arguments.split()])
    assert isinstance(done.exception, SettingsError)
    assert str(done.exception).startswith(message)


@pytest.mark.parametrize(
    ("found", "tried", "low", "high"), [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634)]
)
def test_the_interval_is_wilson_s(found: int, tried: int, low: float, high: float) -> None:
    assert wilson(found, tried) == pytest.approx((low, high), abs=1e-4)
