"""The dialect of KAITO's inference service: /chat and /healthz.

Bodies are read as leniently as that service read them: numbers may come as text ("2", 2.0 for 2), the content type
does not matter. Booleans are no numbers.
"""

from __future__ import annotations

import difflib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from gyrfalcon import errors
from gyrfalcon.http.auth import caller_of
from gyrfalcon.http.kaito_render import (
    STOPPED_EVENT,
    failure,
    render_answer,
    render_deltas,
    render_error,
    render_failure,
)
from gyrfalcon.http.kaito_schema import (
    EXAMPLE,
    ChatEvent,
    ChatRequest,
    ChatResponse,
    DetailResponse,
    GenerateKwargs,
    Healthy,
)
from gyrfalcon.http.openapi import json_body
from gyrfalcon.http.overload import GeneratingRoute, Streams
from gyrfalcon.http.search_parameters import search_arguments
from gyrfalcon.http.settings import HttpSettings
from gyrfalcon.http.wire import (
    EventStream,
    count_failure,
    json_response,
    parse_body,
    quote,
    read_json,
    sse,
    unless_gone,
)
from gyrfalcon.metrics import Metrics
from gyrfalcon.service.interface import (
    ChatMessage,
    ChatPrompt,
    Choice,
    ChoiceEnd,
    GenerateCall,
    GeneratedToken,
    TextService,
)
from gyrfalcon.tracing import trace_headers

NO_PROMPT = "Text generation parameter prompt required"
NO_MESSAGES = "Conversational parameter messages required"

MOST_EVENTS_OF_A_WRITE = 256
# Types that no route declares: bodies are read by hand, events are written by hand.
SCHEMAS = (ChatRequest, ChatEvent)
PATHS = ("/chat", "/healthz")
GENERATING = {"/chat": GeneratingRoute(render_failure, Streams.IF_ASKED)}
ANSWER: dict[str, Any] = {
    "model": ChatResponse,
    "description": "The text; with `stream` a stream of events, one a token: `data: {json}`",
    "content": {"text/event-stream": {"schema": {"$ref": "#/components/schemas/ChatEvent"}}},
}


class KaitoDialect:
    """Translates between this dialect and the service."""

    def __init__(self, service: TextService, settings: HttpSettings, metrics: Metrics) -> None:
        self._service = service
        self._settings = settings
        self._metrics = metrics
        self._body_limits = settings.body_limits

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
            responses={**failures, 200: ANSWER},
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
            prompt = self._prompt(body)
            if not prompt and not body.messages:
                is_missing = body.messages is None and not self._is_conversational
                return json_response({"detail": NO_PROMPT if is_missing else NO_MESSAGES}, 400)
            call = self._call(body, prompt, request)
            if body.stream:
                return self._stream(call, body, prompt)
            completion = await unless_gone(request, self._service.complete(call))
            return json_response(render_answer(completion.choices, completion.num_prompt_tokens, body, prompt))
        except Exception as error:
            return self._failure(error)

    async def health(self) -> Response:
        health = await self._service.health()
        if health.is_healthy:
            return json_response({"status": "Healthy"})
        return json_response({"detail": health.detail or f"the model is {health.state.value}"}, 500)

    @property
    def _is_conversational(self) -> bool:
        return self._settings.kaito_pipeline == "conversational"

    def _prompt(self, body: ChatRequest) -> str | None:
        """The text to continue; None of a conversation."""
        return None if self._is_conversational else body.prompt or None

    def _call(self, body: ChatRequest, prompt: str | None, request: Request) -> GenerateCall:
        """The body as a call. Raises InvalidRequest, which counts as the service's own refusals do."""
        try:
            return to_call(body, prompt, request)
        except errors.InvalidRequest:
            self._metrics.request_begins()
            self._metrics.request_failed("validation")
            raise

    def _stream(self, call: GenerateCall, body: ChatRequest, prompt: str | None) -> Response:
        return EventStream(
            self._events(call, body, prompt),
            ping_s=self._settings.ping_s,
            stall_s=self._settings.stall_s,
            last_words=STOPPED_EVENT,
            on_abort=self._metrics.request_aborted,
        )

    async def _events(self, call: GenerateCall, body: ChatRequest, prompt: str | None) -> AsyncGenerator[bytes, None]:
        """The stream's events, those that are ready together in one chunk; what fails is its last event."""
        tokens: dict[int, list[GeneratedToken]] = {}
        ends: dict[int, ChoiceEnd] = {}
        try:
            async with aclosing(self._service.stream(call)) as batches:
                async for deltas in batches:
                    for delta in deltas:
                        tokens.setdefault(delta.choice, []).append(delta.token)
                        if delta.end is not None:
                            ends[delta.choice] = delta.end
                    for start in range(0, len(deltas), MOST_EVENTS_OF_A_WRITE):
                        yield render_deltas(deltas[start : start + MOST_EVENTS_OF_A_WRITE])
            choices = [
                Choice(index, end.text, end.finish_reason, tuple(tokens[index]), end.seed)
                for index, end in sorted(ends.items())
            ]
            yield sse(render_answer(choices, ends[0].num_prompt_tokens, body, prompt))
        except Exception as error:
            yield sse({"detail": render_error(error)[1]})

    def _failure(self, error: Exception) -> Response:
        count_failure(self._metrics, error)
        return failure(error)


def to_call(body: ChatRequest, prompt: str | None, request: Request) -> GenerateCall:
    """The body in our own parameter names; of the request its trace context. Raises InvalidRequest, NotSupported.

    prompt: the text to continue, None where the body's messages are.
    """
    kwargs = body.generate_kwargs or GenerateKwargs.model_validate({})
    _refuse_unknown(kwargs)
    if prompt is not None and body.handle_long_generation not in {None, "hole"}:
        raise errors.InvalidRequest(
            "handle_long_generation",
            f"`handle_long_generation` must be null or `hole`. Given: {quote(body.handle_long_generation)}",
        )
    for name in ("top_k", "top_p"):
        if kwargs.do_sample and getattr(kwargs, name) < 0:
            raise errors.InvalidRequest(name, f"`{name}` must not be negative. Given: {getattr(kwargs, name)}")
    # A share of nothing keeps the likeliest token alone, as the pipeline behind this dialect did.
    keeps_one = kwargs.top_p == 0
    return GenerateCall(
        prompt=prompt or _conversation(body),
        trace_headers=trace_headers(request.headers),
        caller=caller_of(request),
        prefix=body.prefix if prompt else None,
        drop_start_to_fit=body.handle_long_generation == "hole" and bool(prompt),
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
        frequency_penalty=kwargs.frequency_penalty,
        seed=kwargs.seed,
        watermark=bool(kwargs.watermark),
        stop_token_ids=None if kwargs.eos_token_id is None else (kwargs.eos_token_id,),
        **search_arguments(kwargs),
    )


def _conversation(body: ChatRequest) -> ChatPrompt:
    return ChatPrompt(tuple(ChatMessage(message.role, message.content) for message in body.messages or ()))


def _refuse_unknown(kwargs: GenerateKwargs) -> None:
    """Members without a meaning here; null asks for nothing."""
    for name, value in (kwargs.model_extra or {}).items():
        if value is not None:
            near = difflib.get_close_matches(name[:200], GenerateKwargs.model_fields, n=1, cutoff=0.8)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            raise errors.NotSupported(
                name[:200], f"`generate_kwargs` has no member {quote(name)} that is supported{hint}"
            )
