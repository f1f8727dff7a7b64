"""The hub's two clients, the second in the cases that end in `_async`; runs with any release from 0.36 on."""

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
from huggingface_hub import AsyncInferenceClient, InferenceClient

cases = Cases()
PARAMETERS = SAMPLING | {"frequency_penalty": 0.3, "top_n_tokens": 2}


def client(call: Call, path: str = "") -> InferenceClient:
    return InferenceClient(call.url + path, token=call.key, headers=call.marker, timeout=60)


def async_client(call: Call) -> AsyncInferenceClient:
    return AsyncInferenceClient(call.url, token=call.key, headers=call.marker, timeout=60)


def collect(call: Call, prompt: str, **parameters: Any) -> list[Any]:
    """A stream's items. The client is held: newer releases close their connections when they are collected."""
    held = client(call)
    return list(held.text_generation(prompt, stream=True, **parameters))


async def collect_async(call: Call, prompt: str, **parameters: Any) -> list[Any]:
    held = async_client(call)
    return [item async for item in await held.text_generation(prompt, stream=True, **parameters)]


@cases.case
def defaults(call: Call) -> Any:
    return client(call).text_generation(PROMPT)


@cases.case
async def defaults_async(call: Call) -> Any:
    return await async_client(call).text_generation(PROMPT)


@cases.case
def path_of_generate(call: Call) -> Any:
    return client(call, "/generate").text_generation(PROMPT)


@cases.case
def details(call: Call) -> Any:
    return client(call).text_generation(PROMPT, details=True, decoder_input_details=True, **PARAMETERS)


@cases.case
async def details_async(call: Call) -> Any:
    return await async_client(call).text_generation(PROMPT, details=True, decoder_input_details=True, **PARAMETERS)


@cases.case
def text_alone(call: Call) -> Any:
    return client(call).text_generation(PROMPT, return_full_text=False, **PARAMETERS)


@cases.case
def stream_of_text(call: Call) -> Any:
    return collect(call, PROMPT, max_new_tokens=12)


@cases.case
async def stream_of_text_async(call: Call) -> Any:
    return await collect_async(call, PROMPT, max_new_tokens=12)


@cases.case
def stream_of_details(call: Call) -> Any:
    return collect(call, PROMPT, details=True, return_full_text=True, **PARAMETERS)


@cases.case
async def stream_of_details_async(call: Call) -> Any:
    return await collect_async(call, PROMPT, details=True, return_full_text=True, **PARAMETERS)


@cases.case
def stop(call: Call) -> Any:
    stop = ["e", "never this"]
    return client(call).text_generation(PROMPT, details=True, return_full_text=False, max_new_tokens=60, stop=stop)


@cases.case
def best_of(call: Call) -> Any:
    return client(call).text_generation(PROMPT, details=True, best_of=3, do_sample=True, max_new_tokens=6)


@cases.case
def off_values(call: Call) -> Any:
    """Values that mean off, which text-generation-inference itself refuses in part."""
    return client(call).text_generation(
        PROMPT, top_p=1.0, typical_p=1.0, temperature=1.0, repetition_penalty=1.0, frequency_penalty=0.0, stop=[]
    )


@cases.case
def zero_temperature(call: Call) -> Any:
    return client(call).text_generation(PROMPT, temperature=0.0)


@cases.case
def too_high_best_of(call: Call) -> Any:
    return client(call).text_generation(PROMPT, best_of=100, do_sample=True)


@cases.case
def too_long(call: Call) -> Any:
    return client(call).text_generation(LONG_PROMPT)


@cases.case
async def too_long_async(call: Call) -> Any:
    return await async_client(call).text_generation(LONG_PROMPT)


@cases.case
def too_long_stream(call: Call) -> Any:
    return collect(call, LONG_PROMPT)


@cases.case
async def too_long_stream_async(call: Call) -> Any:
    return await collect_async(call, LONG_PROMPT)


@cases.case
def wrong_type(call: Call) -> Any:
    return client(call).text_generation(PROMPT, top_k="ten")


@cases.case
def unknown_adapter(call: Call) -> Any:
    return client(call).text_generation(PROMPT, adapter_id="nobody/knows-it")


@cases.case
def overloaded(call: Call) -> Any:
    with occupied(call, 4):
        return client(call).text_generation(PROMPT)


@cases.case
async def overloaded_async(call: Call) -> Any:
    with occupied(call, 4):
        return await async_client(call).text_generation(PROMPT)


@cases.case
def overloaded_stream(call: Call) -> Any:
    with occupied(call, 4):
        return collect(call, PROMPT)


@cases.case
def wrong_key(call: Call) -> Any:
    return InferenceClient(call.url, token="wrong", headers=call.marker).text_generation(PROMPT)


@cases.case
def endpoint_info(call: Call) -> Any:
    return InferenceClient(call.url, provider="hf-inference").get_endpoint_info()


@cases.case
def health(call: Call) -> Any:
    return InferenceClient(call.url, provider="hf-inference").health_check()


@cases.case
def abandoned_stream(call: Call) -> Any:
    before = num_dropped(call)
    leaving = client(call)
    next(iter(leaving.text_generation(ENDLESS_PROMPT, stream=True, **ENDLESS)))
    del leaving  # what closes its connection; only newer releases have `close`
    return until_dropped(call, before + 1)


@cases.case
async def cancelled_async(call: Call) -> Any:
    before = num_dropped(call)
    with suppress(TimeoutError):
        await asyncio.wait_for(async_client(call).text_generation(ENDLESS_PROMPT, **ENDLESS), 0.3)
    return until_dropped(call, before + 1)


if __name__ == "__main__":
    cases.run()
