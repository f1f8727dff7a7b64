"""`gyrfalcon generate`: one answer in the terminal, from an engine in this process."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from gyrfalcon.config import LIMITS, LOGS, MEMORY, MODEL, OPTIONS, WATERMARK, Settings

if TYPE_CHECKING:
    from gyrfalcon.service.interface import GenerateCall

# One model and one request: how requests and answers name the model, and who may ask, has no meaning here.
_WITHOUT = ("served_model_name", "strict_model_names", "max_concurrent_requests", "max_best_of", "max_batch_size")
GENERATE_OPTIONS = tuple(
    # The answer is what the terminal is for: log lines only when something is wrong.
    dataclasses.replace(option, default="warning") if option.name == "log_level" else option
    for option in OPTIONS
    if option.group in (MODEL, LIMITS, MEMORY, WATERMARK, LOGS) and option.name not in _WITHOUT
)

_SAMPLING = "Generation"


def generate(
    settings: Settings,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on from; - reads standard input.")],
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Send PROMPT as a user's message through the chat template.", rich_help_panel=_SAMPLING
        ),
    ] = False,
    max_new_tokens: Annotated[int | None, typer.Option(help="Most new tokens.", rich_help_panel=_SAMPLING)] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Divides the logits; not 1: samples.", rich_help_panel=_SAMPLING)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Sample from the k likeliest tokens.", rich_help_panel=_SAMPLING)
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the likeliest tokens of this mass.", rich_help_panel=_SAMPLING)
    ] = None,
    typical_p: Annotated[
        float | None, typer.Option(help="Sample from the most typical tokens of this mass.", rich_help_panel=_SAMPLING)
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1 repeats less.", rich_help_panel=_SAMPLING)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Makes a sampled answer repeatable.", rich_help_panel=_SAMPLING)
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End after this text; may be repeated.", rich_help_panel=_SAMPLING)
    ] = None,
    watermark: Annotated[
        bool, typer.Option("--watermark", help="Mark the text as generated.", rich_help_panel=_SAMPLING)
    ] = False,
) -> None:
    """Continue PROMPT and print the text as it is produced.

    Greedy, unless an option asks for sampling. Nothing is served: the model runs in this process and ends with it.
    """
    from gyrfalcon.service.interface import ChatMessage, ChatPrompt, GenerateCall

    text = sys.stdin.read() if prompt == "-" else prompt
    call = GenerateCall(
        prompt=ChatPrompt((ChatMessage("user", text),)) if chat else text,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        typical_p=typical_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        watermark=watermark,
    )
    asyncio.run(_stream(dataclasses.replace(settings, engine="local"), call, sys.stdout))


async def _stream(settings: Settings, call: GenerateCall, out: TextIO) -> None:
    from gyrfalcon.cli.progress import LoadingProgress
    from gyrfalcon.launch import serving
    from gyrfalcon.telemetry import setup_logging

    setup_logging(settings.json_output, settings.log_level)
    with LoadingProgress() as progress:
        async with (
            serving.open_text_service(settings, on_progress=progress) as service,
            aclosing(service.stream(call)) as batches,
        ):
            async for batch in batches:
                out.write("".join(delta.token.text for delta in batch if not delta.token.special))
                out.flush()
    out.write("\n")
