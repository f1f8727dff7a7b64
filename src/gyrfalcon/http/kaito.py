"""The dialect of KAITO's inference service: /chat and /healthz.

Bodies are read as leniently as that service read them: numbers may come as text ("2", 2.0 for 2), the content type
does not matter. Booleans are no numbers.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.responses import Response

from gyrfalcon import errors
from gyrfalcon.http.openapi import json_body
from gyrfalcon.http.settings import HttpSettings
from gyrfalcon.http.wire import (
    BodyLimits,
    ClientGone,
    MalformedBody,
    ServerStopping,
    count_failure,
    json_response,
    parse_body,
    quote,
    read_json,
    unless_gone,
)
from gyrfalcon.metrics import Metrics
from gyrfalcon.service.interface import ChatMessage, ChatPrompt, Completion, GenerateCall, TextService
from gyrfalcon.tracing import trace_headers

logger = logging.getLogger(__name__)

NO_PROMPT = "Text generation parameter prompt required"
NO_MESSAGES = "Conversational parameter messages required"

EXAMPLE = {
    "prompt": "The falcon is",
    "return_full_text": False,
    "generate_kwargs": {"max_length": 60, "do_sample": True, "top_k": 10},
}

# What the dialect has and this version cannot do yet, with the values that ask for nothing.
NEUTRAL_VALUES: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "length_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": (None,),
    "early_stopping": (False,),
    "output_scores": (False,),
    "return_dict_in_generate": (False,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "remove_invalid_values": (None, False),
}

# Tokenised text has spaces where written text has none; in this order.
CLEANED_SPACES = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


def _no_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number is expected, not a boolean")
    return value


Integer = Annotated[int, BeforeValidator(_no_boolean)]
Number = Annotated[float, BeforeValidator(_no_boolean), Field(allow_inf_nan=False)]


class GenerateKwargs(BaseModel):
    """How to generate. `max_length` and `min_length` count the prompt."""

    model_config = ConfigDict(extra="allow", frozen=True)

    max_length: Integer = Field(200, description="Most tokens of prompt and new text together")
    min_length: Integer = Field(0, description="Fewest tokens of prompt and new text together")
    max_new_tokens: Integer | None = Field(None, description="Most new tokens; wins over `max_length`")
    min_new_tokens: Integer | None = Field(None, description="Fewest new tokens")
    do_sample: bool = Field(True, description="Sample; false takes the likeliest token each time")
    temperature: Number = Field(1.0, description="Above 0; divides the logits")
    top_k: Integer = Field(10, description="Sample among this many likeliest tokens; 0 is off")
    top_p: Number = Field(1.0, description="Sample among the likeliest tokens that hold this share; 1 is off")
    typical_p: Number = Field(1.0, description="Sample among the most typical tokens that hold this share; 1 is off")
    repetition_penalty: Number = Field(1.0, description="Above 0; 1 is off")
    num_return_sequences: Integer = Field(1, description="Number of sequences; `Result` joins their texts")
    eos_token_id: Integer | None = Field(None, description="Id that ends a text, in place of the model's own")
    pad_token_id: Integer | None = Field(None, description="Without effect: no text is ever padded")
    num_beams: Integer = Field(1, description="Only 1 in this version")
    num_beam_groups: Integer = Field(1, description="Only 1 in this version")
    diversity_penalty: Number = Field(0.0, description="Only 0 in this version")
    length_penalty: Number = Field(1.0, description="Only 1 in this version")
    early_stopping: bool = Field(False, description="Only false in this version")
    no_repeat_ngram_size: Integer = Field(0, description="Only 0 in this version")
    encoder_no_repeat_ngram_size: Integer = Field(0, description="Only 0 in this version")
    bad_words_ids: list[Any] | None = Field(None, description="Only null in this version")
    output_scores: bool = Field(False, description="Only false in this version")
    return_dict_in_generate: bool = Field(False, description="Only false in this version")
    forced_bos_token_id: Integer | None = Field(None, description="Only null in this version")
    forced_eos_token_id: Integer | None = Field(None, description="Only null in this version")
    remove_invalid_values: bool | None = Field(None, description="Only null or false in this version")


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(frozen=True)

    role: str
    content: str


class ChatRequest(BaseModel):
    """A prompt, or a conversation where `prompt` is absent, and how to continue it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    prompt: str | None = Field(None, examples=["YOUR_PROMPT_HERE"])
    return_full_text: bool | None = Field(True, description="Put the prompt in front of the new text")
    clean_up_tokenization_spaces: bool | None = Field(False, description="Remove spaces before punctuation")
    prefix: str | None = Field(None, description="Put in front of the prompt, never returned")
    handle_long_generation: str | None = Field(
        None, description="`hole` drops the prompt's start where prompt and new text exceed the context"
    )
    generate_kwargs: GenerateKwargs | None = None
    messages: list[Message] | None = Field(None, description="Used when there is no prompt")


class ChatResponse(BaseModel):
    """The text; of several sequences, all of them one after the other."""

    Result: str


class DetailResponse(BaseModel):
    """What was wrong."""

    detail: Any


class Healthy(BaseModel):
    """The model serves requests."""

    status: str = "Healthy"


SCHEMAS = (ChatRequest,)
PATHS = ("/chat", "/healthz")


class KaitoDialect:
    """Translates between this dialect and the service."""

    def __init__(self, service: TextService, settings: HttpSettings, metrics: Metrics) -> None:
        self._service = service
        self._metrics = metrics
        self._body_limits = BodyLimits(max_bytes=settings.payload_limit, timeout_s=settings.body_timeout_s)

    def add_routes(self, app: FastAPI) -> None:
        failures: dict[int | str, dict[str, Any]] = {
            status: {"model": DetailResponse, "description": description}
            for status, description in (
                (400, "There is no prompt"),
                (401, "The API key is missing or wrong"),
                (422, "A parameter breaks a rule"),
                (429, "The model is overloaded"),
                (500, "The generation failed"),
            )
        }
        app.add_api_route(
            "/chat",
            self.chat,
            methods=["POST"],
            tags=["KAITO"],
            summary="Continue a prompt or a conversation",
            response_model=None,
            responses={**failures, 200: {"model": ChatResponse}},
            openapi_extra=json_body(ChatRequest, EXAMPLE),
        )
        app.add_api_route(
            "/healthz",
            self.health,
            methods=["GET"],
            tags=["KAITO"],
            summary="Health",
            response_model=None,
            responses={200: {"model": Healthy}, 500: {"model": DetailResponse}},
        )

    async def chat(self, request: Request) -> Response:
        try:
            body = parse_body(await read_json(request, self._body_limits, any_content_type=True), ChatRequest)
            if not body.prompt and not body.messages:
                return json_response({"detail": NO_PROMPT if body.messages is None else NO_MESSAGES}, 400)
            completion = await unless_gone(request, self._service.complete(to_call(body, request)))
            return json_response({"Result": render_result(completion, body)})
        except Exception as error:
            return self._failure(error)

    async def health(self) -> Response:
        health = await self._service.health()
        if health.is_healthy:
            return json_response({"status": "Healthy"})
        return json_response({"detail": health.detail or f"the model is {health.state.value}"}, 500)

    def _failure(self, error: Exception) -> Response:
        count_failure(self._metrics, error)
        return failure(error)


def to_call(body: ChatRequest, request: Request) -> GenerateCall:
    """The body in our own parameter names; of the request its trace context. Raises InvalidRequest, NotSupported."""
    kwargs = body.generate_kwargs or GenerateKwargs.model_validate({})
    _refuse_what_is_not_honoured(kwargs)
    if body.handle_long_generation not in {None, "hole"}:
        raise errors.InvalidRequest(
            "handle_long_generation",
            f"`handle_long_generation` must be null or `hole`. Given: {quote(body.handle_long_generation)}",
        )
    for name in ("top_k", "top_p"):
        if kwargs.do_sample and getattr(kwargs, name) < 0:
            raise errors.InvalidRequest(name, f"`{name}` must not be negative. Given: {getattr(kwargs, name)}")
    prompt: str | ChatPrompt = body.prompt or ChatPrompt(
        tuple(ChatMessage(message.role, message.content) for message in body.messages or ())
    )
    # A share of nothing keeps the likeliest token alone, as the pipeline behind this dialect did.
    keeps_one = kwargs.top_p == 0
    return GenerateCall(
        prompt=prompt,
        trace_headers=trace_headers(request.headers),
        prefix=body.prefix if body.prompt else None,
        drop_start_to_fit=body.handle_long_generation == "hole" and bool(body.prompt),
        max_length=kwargs.max_length,
        min_length=kwargs.min_length,
        max_new_tokens=kwargs.max_new_tokens,
        min_new_tokens=kwargs.min_new_tokens,
        do_sample=kwargs.do_sample,
        temperature=kwargs.temperature,
        top_k=1 if keeps_one else kwargs.top_k or None,
        top_p=None if keeps_one or kwargs.top_p >= 1 else kwargs.top_p,
        typical_p=None if kwargs.typical_p >= 1 else kwargs.typical_p,
        repetition_penalty=kwargs.repetition_penalty,
        num_return_sequences=kwargs.num_return_sequences,
        stop_token_ids=None if kwargs.eos_token_id is None else (kwargs.eos_token_id,),
    )


def render_result(completion: Completion, body: ChatRequest) -> str:
    """The `Result`: the sequences' texts with nothing in between; of a conversation, the answer as a message.

    The message is in Python's notation, which is what clients of the conversational form have to read.
    """
    texts = [choice.text for choice in completion.choices]
    if body.clean_up_tokenization_spaces:
        texts = [clean_up_spaces(text) for text in texts]
    if not body.prompt:
        return "".join(str({"role": "assistant", "content": text}) for text in texts)
    shown = "" if body.return_full_text is False else body.prompt
    return "".join(shown + text for text in texts)


def clean_up_spaces(text: str) -> str:
    """The text without the spaces that tokenised text has before punctuation and contractions."""
    for spaced, clean in CLEANED_SPACES:
        text = text.replace(spaced, clean)
    return text


def failure(error: Exception) -> Response:
    """The answer to a request that failed, in this dialect."""
    headers: dict[str, str] = {}
    detail: object = str(error)
    match error:
        case MalformedBody():
            # The service behind this dialect answered 422 to whatever it could not read.
            status = 422 if error.status == 400 else error.status
            detail = [{"loc": ["body", *error.loc], "msg": str(error), "type": error.kind}]
        case errors.RequestError():
            status = 422
        case errors.Overloaded():
            status = 429
            headers["Retry-After"] = str(error.retry_after_s)
        case errors.GenerationFailed():
            status = 500
        case errors.EngineDead():
            status = 503
            headers["Retry-After"] = "5"
        case ServerStopping():
            status = 503
            headers["Retry-After"] = "5"
        case ClientGone():
            status = 499
        case _:
            logger.error("request failed unexpectedly", exc_info=error)
            status, detail = 500, "Internal Server Error"
    return json_response({"detail": detail}, status, headers)


def _refuse_what_is_not_honoured(kwargs: GenerateKwargs) -> None:
    for name, neutral in NEUTRAL_VALUES.items():
        value = getattr(kwargs, name)
        if value not in neutral:
            raise errors.NotSupported(
                name,
                f"`generate_kwargs.{name}` is supported only as {quote(neutral[0])} by this version. "
                f"Given: {quote(value)}",
            )
    for name, value in (kwargs.model_extra or {}).items():
        if value is not None:
            raise errors.NotSupported(name[:200], f"`generate_kwargs` has no member {quote(name)} that is supported")
