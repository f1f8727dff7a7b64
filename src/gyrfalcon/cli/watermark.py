"""`gyrfalcon detect`: whether a text carries a watermark, in the terminal and in scripts."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gyrfalcon.config import DEBUG_VARIABLE, OPTIONS, Settings
from gyrfalcon.errors import GyrfalconError, SettingsError
from gyrfalcon.options import Option

if TYPE_CHECKING:
    from gyrfalcon.service.interface import Detection, TokenPrompt

FOUND, NOT_FOUND, WRONG, UNDECIDED = 0, 1, 2, 3

_WANTED = ("model", "revision", "huggingface_hub_cache", "offline", "watermark_gamma", "watermark_key")
DETECT_OPTIONS = tuple(
    dataclasses.replace(option, flags=(*option.flags, "--gamma")) if option.name == "watermark_gamma" else option
    for option in OPTIONS
    if option.name in _WANTED
)
_KEY: Option = next(option for option in OPTIONS if option.name == "watermark_key")


def detect(
    settings: Settings,
    file: Annotated[str, typer.Argument(metavar="FILE", help="The text, in UTF-8; - reads standard input.")],
    key: Annotated[
        list[str] | None,
        typer.Option(
            "--key", metavar="NUMBER", help="Watermark key to try in place of the configured one; may be repeated."
        ),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="False-positive rate of the decision, all keys together. [default 0.0001]")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="FILE", help="What the text went on from: lets its first token be scored.")
    ] = None,
    token_ids: Annotated[
        bool, typer.Option("--token-ids", help="FILE holds a JSON list of the text's token ids.")
    ] = False,
    count_repeated: Annotated[
        bool, typer.Option("--count-repeated", help="Score a token after the same token each time, not once only.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with a flag for every token.")] = False,
) -> None:
    """Look for a watermark in FILE. Exit code 0: found, 1: not found, 2: wrong usage, 3: too short to say.

    The model gives the tokenizer: that of the model which may have written the text. Its weights are not loaded. A key
    is better given by the variable GYRFALCON_WATERMARK_KEY than by a flag, which other users of the machine can see.
    """
    from gyrfalcon.launch.watermark import detect_offline
    from gyrfalcon.service.interface import DetectCall

    if prompt == "-" == file:
        raise SettingsError("--prompt", "standard input is FILE's already")
    found = detect_offline(
        settings,
        DetectCall(
            text=_read_ids(file) if token_ids else _read_text(file, "FILE"),
            prompt=None if prompt is None else _read_text(prompt, "--prompt"),
            keys=tuple(_read_key(text) for text in key) if key else None,
            alpha=alpha,
            ignore_repeated=not count_repeated,
        ),
    )
    print(json.dumps(dataclasses.asdict(found)) if as_json else _describe(found))
    raise typer.Exit({True: FOUND, False: NOT_FOUND, None: UNDECIDED}[found.is_found])


def with_own_exit_codes(command: Callable[..., None]) -> Callable[..., None]:
    """The command with exit code 2 for a deliberate error, where 1 is an answer."""

    @functools.wraps(command)
    def run(**given: Any) -> None:
        try:
            command(**given)
        except GyrfalconError as error:
            if os.environ.get(DEBUG_VARIABLE) == "1":
                raise
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(WRONG) from None

    return run


def _read_text(name: str, setting: str) -> str:
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return content.decode("utf-8")
    except OSError as error:
        raise SettingsError(setting, f"`{name}` cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(setting, f"`{name}` is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _read_ids(name: str) -> TokenPrompt:
    from gyrfalcon.service.interface import TokenPrompt

    try:
        ids = json.loads(_read_text(name, "FILE"))
    except ValueError as error:
        raise SettingsError("FILE", f"`{name}` is not a JSON list of token ids: {error}") from error
    if not isinstance(ids, list) or not all(type(id_) is int for id_ in ids):
        raise SettingsError("FILE", f"`{name}` is not a JSON list of token ids")
    return TokenPrompt(tuple(ids))


def _read_key(text: str) -> int:
    key = dataclasses.replace(_KEY, flags=("--key",)).read(text, "flag")
    assert isinstance(key, int)
    return key


def _describe(found: Detection) -> str:
    """The findings in words, the decision first."""
    verdict = {True: "watermark found", False: "no watermark found", None: f"cannot be said: {found.reason}"}
    lines = [
        verdict[found.is_found],
        f"tokens     {found.num_scored} scored of {len(found.tokens)}, by the tokenizer of {found.model}",
        f"threshold  p <= {found.alpha:g}{', corrected for the number of keys' if len(found.keys) > 1 else ''}",
    ]
    for index, score in enumerate(found.keys):
        if score.green_fraction is None or score.z_score is None:
            continue
        lines.append(
            f"key {index + 1:<6} {score.num_green} green ({score.green_fraction:.1%}, {found.gamma:.1%} expected), "
            f"z = {score.z_score:.2f}, p = {score.p_value:.2g}"
            + (f", corrected {score.corrected_p_value:.2g}" if len(found.keys) > 1 else "")
        )
    return "\n".join(lines)
