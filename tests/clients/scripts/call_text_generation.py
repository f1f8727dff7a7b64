"""text-generation's two clients, the second in the cases that end in `_async`."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from harness import (
    ENDLESS,
    ENDLESS_PROMPT,
    LONG_PROMPT,
    PROMPT,
    SAMPLING,
    Call,
    Cases,
    num_dropped,
    occupied,
    until_dropped,
)
from text_generation import AsyncClient, Client
from text_generation.types import Grammar, GrammarType

cases = Cases()
PARAMETERS = SAMPLING | {"frequency_penalty": 0.3, "top_n_tokens": 2}


def client(call: Call) -> Client:
    return Client(call.url, headers=call.headers)


def async_client(call: Call) -> AsyncClient:
    return AsyncClient(call.url, headers=call.headers)


async def collect(call: Call, prompt: str, **parameters: Any) -> list[Any]:
    return [event async for event in async_client(call).generate_stream(prompt, **parameters)]


@cases.case
def defaults(call: Call) -> Any:
    return client(call).generate(PROMPT)


@cases.case
async def defaults_async(call: Call) -> Any:
    return await async_client(call).generate(PROMPT)


@cases.case
def everything(call: Call) -> Any:
    return client(call).generate(PROMPT, decoder_input_details=True, return_full_text=True, **PARAMETERS)


@cases.case
async def everything_async(call: Call) -> Any:
    return await async_client(call).generate(PROMPT, decoder_input_details=True, return_full_text=True, **PARAMETERS)


@cases.case
def stream(call: Call) -> Any:
    return list(client(call).generate_stream(PROMPT, **PARAMETERS))


@cases.case
async def stream_async(call: Call) -> Any:
    return await collect(call, PROMPT, **PARAMETERS)


@cases.case
def stop(call: Call) -> Any:
    return client(call).generate(PROMPT, max_new_tokens=60, stop_sequences=["e", "never this"])


@cases.case
async def stop_async(call: Call) -> Any:
    return await async_client(call).generate(PROMPT, max_new_tokens=60, stop_sequences=["e", "never this"])


@cases.case
def best_of(call: Call) -> Any:
    return client(call).generate(PROMPT, best_of=3, do_sample=True, max_new_tokens=6, return_full_text=True)


@cases.case
async def best_of_async(call: Call) -> Any:
    return await async_client(call).generate(PROMPT, best_of=3, do_sample=True, max_new_tokens=6, return_full_text=True)


@cases.case
def too_long(call: Call) -> Any:
    return client(call).generate(LONG_PROMPT)


@cases.case
async def too_long_async(call: Call) -> Any:
    return await async_client(call).generate(LONG_PROMPT)


@cases.case
def too_long_stream(call: Call) -> Any:
    return list(client(call).generate_stream(LONG_PROMPT))


@cases.case
async def too_long_stream_async(call: Call) -> Any:
    return await collect(call, LONG_PROMPT)


@cases.case
def too_many_stops(call: Call) -> Any:
    return client(call).generate(PROMPT, stop_sequences=list("abcdefghi"))


@cases.case
def too_high_best_of(call: Call) -> Any:
    return client(call).generate(PROMPT, best_of=100, do_sample=True)


@cases.case
def grammar(call: Call) -> Any:
    digits = Grammar(type=GrammarType.Regex, value="[0-9]+")
    return client(call).generate(PROMPT, grammar=digits)


@cases.case
def overloaded(call: Call) -> Any:
    with occupied(call, 4):
        return client(call).generate(PROMPT)


@cases.case
def overloaded_stream(call: Call) -> Any:
    with occupied(call, 4):
        return list(client(call).generate_stream(PROMPT))


@cases.case
async def overloaded_async(call: Call) -> Any:
    with occupied(call, 4):
        return await async_client(call).generate(PROMPT)


@cases.case
async def overloaded_stream_async(call: Call) -> Any:
    with occupied(call, 4):
        return await collect(call, PROMPT)


@cases.case
def wrong_key(call: Call) -> Any:
    return Client(call.url, headers=call.marker | {"Authorization": "Bearer wrong"}).generate(PROMPT)


@cases.case
def abandoned_stream(call: Call) -> Any:
    before = num_dropped(call)
    events = client(call).generate_stream(ENDLESS_PROMPT, **ENDLESS)
    next(events)
    events.close()
    return until_dropped(call, before + 1)


@cases.case
async def cancelled_async(call: Call) -> Any:
    before = num_dropped(call)
    with suppress(TimeoutError):
        await asyncio.wait_for(async_client(call).generate(ENDLESS_PROMPT, **ENDLESS), 0.3)
    return until_dropped(call, before + 1)


if __name__ == "__main__":
    cases.run()
