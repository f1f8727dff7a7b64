"""Haystack's generator, over the hub's client."""

from __future__ import annotations

from typing import Any

from harness import ENDLESS, ENDLESS_PROMPT, LONG_PROMPT, PROMPT, SAMPLING, Call, Cases, occupied
from haystack import Pipeline
from haystack.components.builders import PromptBuilder
from haystack.components.generators import HuggingFaceAPIGenerator
from haystack.utils import Secret

cases = Cases()


def generator(call: Call, **settings: Any) -> HuggingFaceAPIGenerator:
    return HuggingFaceAPIGenerator(
        api_type="text_generation_inference",
        api_params={"url": call.url, "headers": call.marker},
        token=Secret.from_token(call.key),
        **settings,
    )


def streamed(call: Call, prompt: str, **settings: Any) -> Any:
    """The chunks that a callback was given, and the answer."""
    chunks: list[Any] = []

    def keep(chunk: Any) -> None:
        chunks.append({"content": chunk.content, "meta": chunk.meta, "finish_reason": chunk.finish_reason})

    answer = generator(call, streaming_callback=keep, **settings).run(prompt)
    return {"chunks": chunks, "answer": answer}


@cases.case
def defaults(call: Call) -> Any:
    return generator(call).run(PROMPT)


@cases.case
def everything(call: Call) -> Any:
    return generator(call, generation_kwargs=SAMPLING | {"return_full_text": False}).run(PROMPT)


@cases.case
def stream(call: Call) -> Any:
    return streamed(call, ENDLESS_PROMPT, generation_kwargs=ENDLESS | {"max_new_tokens": 12})


@cases.case
def stop(call: Call) -> Any:
    return generator(call, stop_words=["e"], generation_kwargs={"max_new_tokens": 60, "return_full_text": False}).run(
        PROMPT
    )


@cases.case
def pipeline(call: Call) -> Any:
    line = Pipeline()
    line.add_component("prompt", PromptBuilder("{{ what }} of", required_variables=["what"]))
    line.add_component("model", generator(call, generation_kwargs=dict(SAMPLING)))
    line.connect("prompt", "model")
    return line.run({"prompt": {"what": "Return the number"}})["model"]


@cases.case
def too_long(call: Call) -> Any:
    return generator(call).run(LONG_PROMPT)


@cases.case
def too_long_stream(call: Call) -> Any:
    return streamed(call, LONG_PROMPT)


@cases.case
def overloaded(call: Call) -> Any:
    with occupied(call, 4):
        return generator(call).run(PROMPT)


if __name__ == "__main__":
    cases.run()
