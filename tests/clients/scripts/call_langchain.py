"""LangChain's two clients of a text-generation server.

HuggingFaceEndpoint of langchain-huggingface, over the hub's client; or, with the argument `community`, its predecessor
HuggingFaceTextGenInference of langchain-community, over text-generation's client.
"""

from __future__ import annotations

import sys
from typing import Any

from harness import LONG_PROMPT, PROMPT, SAMPLING, Call, Cases, occupied

cases = Cases()

if sys.argv[1:2] == ["community"]:
    del sys.argv[1]
    from langchain_community.llms.huggingface_text_gen_inference import HuggingFaceTextGenInference as LanguageModel

    URL = "inference_server_url"
else:
    from langchain_huggingface import HuggingFaceEndpoint as LanguageModel

    URL = "endpoint_url"


def model(call: Call, **parameters: Any) -> Any:
    return LanguageModel(**{URL: call.url}, server_kwargs={"headers": call.headers}, **parameters)


@cases.case
def defaults(call: Call) -> Any:
    return model(call).invoke(PROMPT)


@cases.case
def everything(call: Call) -> Any:
    return model(call, **SAMPLING).invoke(PROMPT)


@cases.case
async def everything_async(call: Call) -> Any:
    return await model(call, **SAMPLING).ainvoke(PROMPT)


@cases.case
def full_text(call: Call) -> Any:
    return model(call, seed=3, max_new_tokens=6, return_full_text=True).invoke(PROMPT)


@cases.case
def stream(call: Call) -> Any:
    return list(model(call, **SAMPLING).stream(PROMPT))


@cases.case
async def stream_async(call: Call) -> Any:
    return [text async for text in model(call, **SAMPLING).astream(PROMPT)]


@cases.case
def streaming_invoke(call: Call) -> Any:
    return model(call, streaming=True, **SAMPLING).invoke(PROMPT)


@cases.case
def stop(call: Call) -> Any:
    return model(call, seed=3, max_new_tokens=100, stop_sequences=["never this"]).invoke(PROMPT, stop=["e"])


@cases.case
def stop_stream(call: Call) -> Any:
    return list(model(call, seed=3, max_new_tokens=100).stream(PROMPT, stop=["e"]))


@cases.case
def batch(call: Call) -> Any:
    prompts = [PROMPT, "Raise an error", "The value"]
    return model(call, seed=3, max_new_tokens=8).batch(prompts)


@cases.case
def too_long(call: Call) -> Any:
    return model(call).invoke(LONG_PROMPT)


@cases.case
def overloaded(call: Call) -> Any:
    with occupied(call, 4):
        return model(call).invoke(PROMPT)


if __name__ == "__main__":
    cases.run()
