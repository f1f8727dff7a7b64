"""`gyrfalcon watermark-calibrate`: how often a model's watermark is found, and how often one that is not there.

Three kinds of text are scored: marked and unmarked ones of the model, and ordinary text that no model wrote. Under the
server's key each text is one trial. For false positives each text is scored under many random keys as well: colours
under different keys are independent, so that even small rates are measured with few texts.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gyrfalcon.cli.generate import GENERATE_OPTIONS
from gyrfalcon.config import Settings
from gyrfalcon.errors import SettingsError

if TYPE_CHECKING:
    from gyrfalcon.service.interface import TextService

CALIBRATE_OPTIONS = GENERATE_OPTIONS

# Kinds of texts, and the keys each is scored with.
_KINDS = (
    ("marked", "server"),
    ("unmarked", "server"),
    ("unmarked", "random"),
    ("ordinary", "server"),
    ("ordinary", "random"),
)

PROMPT_WORDS = 8
PARAGRAPH_WORDS = 30  # of those that are long enough to begin a text with
CONCURRENT_REQUESTS = 16
KEYS_AT_ONCE = 16  # a call may try this many
_WIDTH_WITHOUT_TERMINAL = 160  # columns; a pipe has none of its own
Z_95 = 1.959964  # of a normal variable's central 95 %


@dataclass(frozen=True, slots=True, kw_only=True)
class Trials:
    """What is tried. temperature: 0 is greedy. num_keys: random keys for each text, for false positives."""

    num_texts: int
    lengths: tuple[int, ...]  # tokens, ascending
    alphas: tuple[float, ...]
    temperature: float
    num_keys: int
    seed: int


@dataclass(frozen=True, slots=True)
class Rate:
    """How many of so many texts were found, with Wilson's 95 % interval of the rate."""

    alpha: float
    found: int
    tried: int
    rate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One kind of text at one length under one kind of key."""

    text: str  # "marked", "unmarked", "ordinary"
    key: str  # "server", "random"
    num_tokens: int
    mean_scored: float
    mean_green_fraction: float
    rates: tuple[Rate, ...]


@dataclass(frozen=True, slots=True)
class _Score:
    num_scored: int
    num_green: int
    p_value: float


def watermark_calibrate(
    settings: Settings,
    texts: Annotated[int, typer.Option(min=1, help="Texts of each kind.")] = 100,
    lengths: Annotated[str, typer.Option(help="Lengths of texts in tokens.")] = "25,50,100,200",
    alphas: Annotated[str, typer.Option(help="False-positive rates to decide at.")] = "0.01,0.0001",
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the model's texts; 0 is greedy.")] = 1.0,
    random_keys: Annotated[
        int, typer.Option(min=0, help="Random keys that each text without a mark is tried with.")
    ] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts, samples and random keys.")] = 0,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts, one a line. [default from Python's manual]")
    ] = None,
    ordinary: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text that no model wrote. [default Python's manual]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure detection and false-positive rates by length, on texts that the model writes for it.

    Greedy texts depend on nothing but their prompt; sampled ones are repeatable by --seed.
    """
    if not math.isfinite(temperature):
        raise SettingsError("--temperature", f"`{temperature}` is not a finite number")
    trials = Trials(
        num_texts=texts,
        lengths=tuple(sorted({int(length) for length in _numbers("--lengths", lengths, low=2, is_whole=True)})),
        alphas=_numbers("--alphas", alphas, low=0.0, high=1.0),
        temperature=temperature,
        num_keys=random_keys,
        seed=seed,
    )
    manual = _manual()
    beginnings = _beginnings(manual) if prompts is None else _read(prompts, "--prompts").splitlines()
    beginnings = [line for line in beginnings if line.strip()]
    text = manual if ordinary is None else _read(ordinary, "--ordinary")
    if not beginnings:
        raise SettingsError("--prompts", f"`{prompts}` holds no prompt")
    rows = asyncio.run(_calibrate(dataclasses.replace(settings, engine="local"), trials, beginnings, text))
    if as_json:
        shown = {name: getattr(settings, name) for name in ("model", "watermark_gamma", "watermark_delta")}
        print(json.dumps({**shown, **dataclasses.asdict(trials), "rows": [dataclasses.asdict(row) for row in rows]}))
    else:
        _print_table(rows, settings, trials)


def wilson(found: int, tried: int) -> tuple[float, float]:
    """The 95 % interval of a rate (Wilson 1927, doi 10.2307/2276774): true also where all or none were found."""
    rate, weight = found / tried, Z_95**2 / tried
    centre = (rate + weight / 2) / (1 + weight)
    half = math.sqrt(rate * (1 - rate) * weight + weight**2 / 4) / (1 + weight)
    return max(centre - half, 0.0), min(centre + half, 1.0)


async def _calibrate(settings: Settings, trials: Trials, prompts: list[str], ordinary: str) -> list[Row]:
    from gyrfalcon.cli.progress import LoadingProgress
    from gyrfalcon.launch import serving
    from gyrfalcon.telemetry import setup_logging

    setup_logging(settings.json_output, settings.log_level)
    rng = random.Random(trials.seed)
    with LoadingProgress() as progress:
        async with serving.open_text_service(settings, on_progress=progress) as service:
            pieces = await _cut(service, ordinary, trials, rng)
            shuffled = rng.sample(prompts, len(prompts))
            beginnings = [shuffled[index % len(prompts)] for index in range(trials.num_texts)]
            texts = {
                "marked": await _generate(service, settings, trials, beginnings, watermark=True),
                "unmarked": await _generate(service, settings, trials, beginnings, watermark=False),
                "ordinary": pieces,
            }
            return [
                _row(kind, key, length, await _score_all(service, same_length, trials, rng, key), trials)
                for kind, key in _KINDS
                if key == "server" or trials.num_keys
                for length, same_length in texts[kind].items()
            ]


async def _generate(
    service: TextService, settings: Settings, trials: Trials, prompts: list[str], *, watermark: bool
) -> dict[int, list[str]]:
    """Continuations of the prompts by length: the longest, and their beginnings. None ends by itself."""
    from gyrfalcon.service.interface import GenerateCall

    longest = trials.lengths[-1]
    gate = asyncio.Semaphore(min(CONCURRENT_REQUESTS, settings.max_concurrent_requests))

    async def tokens(index: int, prompt: str) -> list[str]:
        call = GenerateCall(
            prompt=prompt,
            max_new_tokens=longest,
            min_new_tokens=longest,
            do_sample=trials.temperature > 0.0,
            temperature=trials.temperature or None,
            seed=2 * (trials.seed * trials.num_texts + index) + watermark,
            watermark=watermark,
        )
        async with gate:
            completion = await service.complete(call)
        return [token.text for token in completion.choices[0].tokens if not token.special]

    texts = await asyncio.gather(*(tokens(index, prompt) for index, prompt in enumerate(prompts)))
    return {length: ["".join(pieces[:length]) for pieces in texts] for length in trials.lengths}


async def _cut(service: TextService, text: str, trials: Trials, rng: random.Random) -> dict[int, list[str]]:
    """Pieces of the text by length, drawn from all over it."""
    longest = trials.lengths[-1]
    spans = await service.tokenize(text, add_special_tokens=False)
    starts = range(0, len(spans) - longest + 1, longest)
    if len(starts) < trials.num_texts:
        raise SettingsError(
            "--ordinary", f"the text has {len(spans)} tokens; {trials.num_texts} pieces of {longest} are wanted"
        )
    raw = text.encode("utf-8")
    chosen = rng.sample(starts, trials.num_texts)
    return {
        length: [raw[spans[start].start : spans[start + length - 1].stop].decode("utf-8", "ignore") for start in chosen]
        for length in trials.lengths
    }


async def _score_all(
    service: TextService, texts: Sequence[str], trials: Trials, rng: random.Random, key: str
) -> list[_Score]:
    """The texts' scores under the server's key, or each one's under random keys of its own."""
    scores = []
    for text in texts:
        keys = [rng.getrandbits(64) for _ in range(trials.num_keys)] if key == "random" else None
        scores += await _score(service, text, keys)
    return scores


async def _score(service: TextService, text: str, keys: list[int] | None) -> list[_Score]:
    """The text's score under the server's key, or under each of some others."""
    from gyrfalcon.service.interface import DetectCall

    if not text:  # the model wrote special tokens alone
        return [_Score(0, 0, 1.0)] * (1 if keys is None else len(keys))
    batches = [None] if keys is None else [keys[at : at + KEYS_AT_ONCE] for at in range(0, len(keys), KEYS_AT_ONCE)]
    scores = []
    for batch in batches:
        found = await service.detect(DetectCall(text=text, keys=None if batch is None else tuple(batch)))
        scores += [_Score(found.num_scored, score.num_green, score.p_value) for score in found.keys]
    return scores


def _row(text: str, key: str, num_tokens: int, scores: Sequence[_Score], trials: Trials) -> Row:
    tried = len(scores)
    rates = []
    for alpha in trials.alphas:
        found = sum(score.p_value <= alpha for score in scores)
        rates.append(Rate(alpha, found, tried, found / tried, *wilson(found, tried)))
    return Row(
        text=text,
        key=key,
        num_tokens=num_tokens,
        mean_scored=statistics.fmean(score.num_scored for score in scores),
        mean_green_fraction=statistics.fmean(score.num_green / max(score.num_scored, 1) for score in scores),
        rates=tuple(rates),
    )


def _manual() -> str:
    """Python's own reference manual, which every installation has."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _beginnings(text: str) -> list[str]:
    """The first words of the text's paragraphs, of those that are sentences."""
    paragraphs = (" ".join(piece.split()) for piece in text.split("\n\n"))
    long_ones = (piece for piece in paragraphs if piece[:1].isupper() and piece.count(" ") >= PARAGRAPH_WORDS)
    return list(dict.fromkeys(" ".join(piece.split()[:PROMPT_WORDS]) for piece in long_ones))


def _numbers(flag: str, text: str, *, low: float, high: float = math.inf, is_whole: bool = False) -> tuple[float, ...]:
    """A list of numbers as it is typed. low: allowed where they are whole, else not; high: not allowed."""
    try:
        numbers = tuple(int(part) if is_whole else float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    is_fine = numbers and all((low <= number if is_whole else low < number) and number < high for number in numbers)
    if not is_fine:
        rule = f"whole numbers from {low:g} up" if is_whole else f"numbers above {low:g} and below {high:g}"
        raise SettingsError(flag, f"`{text}` is not a list of {rule}, with commas between them")
    return numbers


def _read(path: Path, flag: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(flag, f"`{path}` cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(flag, f"`{path}` is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _print_table(rows: Sequence[Row], settings: Settings, trials: Trials) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("text", "key"):
        table.add_column(heading)
    for heading in ("tokens", "scored", "green", "trials", *(f"found at {alpha:g}" for alpha in trials.alphas)):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.text,
            row.key,
            str(row.num_tokens),
            f"{row.mean_scored:.1f}",
            f"{row.mean_green_fraction:.1%}",
            str(row.rates[0].tried),
            *(f"{_percent(rate.rate)} ({_percent(rate.low)} to {_percent(rate.high)})" for rate in row.rates),
        )
    console = Console(width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL)
    how = f"temperature {trials.temperature:g}" if trials.temperature else "greedy"
    console.print(
        f"{settings.model}, {how}, gamma {settings.watermark_gamma:g}, delta {settings.watermark_delta:g}; "
        "rates in % with 95 % intervals"
    )
    console.print(table)


def _percent(rate: float) -> str:
    return f"{100 * rate:.3g}"
