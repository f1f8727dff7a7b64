"""The types of text-generation-inference's dialect: what its bodies and answers hold."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from gyrfalcon.http.search_parameters import Integer, SearchParameters

EXAMPLE = {
    "inputs": "My name is Olivier and I",
    "parameters": {"max_new_tokens": 20, "temperature": 0.5, "top_p": 0.95, "details": True, "stop": ["photographer"]},
}

CHAT_EXAMPLE = {"messages": [{"role": "user", "content": "What does a gyrfalcon eat?"}]}
VERTEX_EXAMPLE = {"instances": [EXAMPLE]}

UInt32 = Annotated[int, Field(ge=0, le=2**32 - 1)]
UInt64 = Annotated[int, Field(ge=0, le=2**64 - 1)]
Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]


class Body(BaseModel):
    """No coercion; members the dialect does not have are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class TgiParameters(Body):
    """What the dialect has always had."""

    best_of: UInt64 | None = Field(
        None,
        description="Generate this many sequences and return the one with the highest mean token "
        "log-probability; the others are in `details.best_of_sequences`. Needs sampling and no `seed`.",
        examples=[1],
    )
    decoder_input_details: bool = Field(
        False,
        description="Return the prompt's tokens with their log-probabilities. Implies `details`; must be "
        "false when streaming.",
    )
    details: bool = Field(False, description="Return the generated tokens and how generation ended.")
    do_sample: bool = Field(
        False,
        description="Sample. Also implied by `temperature` other than 1, `top_k`, `top_p` or `typical_p` below 1, and "
        "by `min_p` or a cut-off above 0.",
    )
    frequency_penalty: float | None = Field(
        None, description="-2 to 2; subtracted from a token's logit in proportion to its share of the tokens so far."
    )
    max_new_tokens: UInt32 | None = Field(
        None, description="At most this many new tokens; null for the server's default.", examples=[20]
    )
    min_new_tokens: UInt32 | None = Field(
        None,
        description="At least this many new tokens: the end of the text is not chosen before. An extension of ours.",
    )
    repetition_penalty: float | None = Field(None, description="Above 0; 1 is off.", examples=[1.03])
    return_full_text: bool | None = Field(
        None, description="Put the prompt in front of `generated_text`. Null is false, except on `POST /`."
    )
    seed: UInt64 | None = Field(None, description="Makes sampling repeatable; null draws one.")
    stop: list[str] = Field(
        default_factory=list,
        description="Strings that end the text once it contains one; the text keeps it.",
        examples=[["photographer"]],
    )
    temperature: float | None = Field(None, description="Above 0; divides the logits.", examples=[0.5])
    top_k: Int32 | None = Field(None, description="Sample among this many likeliest tokens.", examples=[10])
    top_n_tokens: UInt32 | None = Field(None, description="Report this many likeliest tokens at every position.")
    top_p: float | None = Field(
        None, description="Above 0, at most 1: sample among the likeliest tokens that hold this share.", examples=[0.95]
    )
    truncate: UInt64 | None = Field(None, description="Keep only this many tokens of the prompt, its last.")
    typical_p: float | None = Field(
        None,
        description="Above 0, at most 1: sample among the most typical tokens that hold this share.",
        examples=[0.95],
    )
    watermark: bool = Field(False, description="Mark the text statistically (arXiv 2301.10226).")
    grammar: Any = Field(None, description="Not supported by this version: refused unless null.")
    adapter_id: str | None = Field(None, description="Not supported by this version: refused unless null.")


class GenerateParameters(SearchParameters, TgiParameters):
    """How to generate. Every member may be left out. Those from `num_beams` on are extensions of ours."""

    num_return_sequences: Integer | None = Field(
        None,
        description="Generate this many sequences: independent samples, or the best of the beams. The first is the "
        "answer, the others are in `details.best_of_sequences`. Not with a stream.",
    )
    min_length: UInt32 | None = Field(
        None, description="At least this many tokens of prompt and new text together; `min_new_tokens` wins over it."
    )


class GenerateRequest(Body):
    """A prompt and how to continue it."""

    inputs: str = Field(description="The prompt.", examples=["My name is Olivier and I"])
    parameters: GenerateParameters = Field(default_factory=lambda: GenerateParameters.model_validate({}))
    model: str | None = Field(None, description="Which of the served models to run; null for the default one.")


class CompatGenerateRequest(GenerateRequest):
    """As `GenerateRequest`, and whether to stream."""

    stream: bool = Field(False, description="Answer with an event stream, as `/generate_stream` does.")


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


TurnContent = str | list[TextPart]


class Turn(Body):
    """One message of a conversation."""

    role: str
    content: TurnContent = Field(description="A text, or its pieces")


class ChatTokenizeRequest(Body):
    """A conversation. What else a chat request may hold has no effect on its tokens."""

    messages: list[Turn]
    model: str | None = Field(None, description="Which of the served models' templates; null for the default one.")
    tools: list[Any] | None = Field(None, description="Not supported by this version: refused unless null or empty.")


class VertexInstance(GenerateRequest):
    """As `GenerateRequest`; `parameters` may be null."""

    @field_validator("parameters", mode="before")
    @classmethod
    def _null_is_absent(cls, value: object) -> object:
        return {} if value is None else value


class VertexRequest(Body):
    """Prompts, each with its own parameters."""

    instances: list[VertexInstance] = Field(min_length=1)


class VertexResponse(BaseModel):
    """The generated texts, in the order of the instances."""

    predictions: list[str]


class SimpleToken(BaseModel):
    """A token of a text; offsets in bytes of its UTF-8 form, `stop` not included."""

    id: int
    text: str
    start: int
    stop: int


class ChatTokenizeResponse(BaseModel):
    """A conversation as the model reads it."""

    tokenize_response: list[SimpleToken]
    templated_text: str


class Token(BaseModel):
    """A generated token."""

    id: int
    text: str
    logprob: float | None
    special: bool


class PrefillToken(BaseModel):
    """A token of the prompt; the first has no log-probability."""

    id: int
    text: str
    logprob: float | None


class SequenceDetails(BaseModel):
    """How one sequence was generated."""

    finish_reason: str = Field(description="`length`, `eos_token` or `stop_sequence`")
    generated_tokens: int
    seed: int | None = Field(description="The seed, when the sequence was sampled")
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | None = Field(None, description="Only with `top_n_tokens`")


class BestOfSequence(SequenceDetails):
    """One of the sequences that were not the best."""

    generated_text: str


class Details(SequenceDetails):
    """How the answer was generated."""

    best_of_sequences: list[BestOfSequence] | None = Field(None, description="Only with `best_of` above 1")


class GenerateResponse(BaseModel):
    """The generated text; `details` only when asked for."""

    generated_text: str
    details: Details | None = None


class StreamDetails(BaseModel):
    """How the stream ended."""

    finish_reason: str
    generated_tokens: int
    seed: int | None
    input_length: int


class StreamResponse(BaseModel):
    """One event of a stream; the last one has `generated_text`."""

    index: int
    token: Token
    top_tokens: list[Token] | None = Field(None, description="Only with `top_n_tokens`")
    generated_text: str | None
    details: StreamDetails | None


class ErrorResponse(BaseModel):
    """What was wrong."""

    error: str
    error_type: str


class Info(BaseModel):
    """The default model and its limits."""

    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None
    model_dtype: str
    model_device_type: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_top_n_tokens: int
    max_input_tokens: int
    max_input_length: int
    max_total_tokens: int
    max_batch_total_tokens: int
    default_max_new_tokens: int | None
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None
    models: list[str]
