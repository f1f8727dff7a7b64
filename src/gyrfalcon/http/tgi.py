"""The dialect of text-generation-inference: generation, tokens, health and limits.

/generate, /generate_stream and / generate; /tokenize and /chat_tokenize count; /info, /health and /ping tell.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from enum import Enum
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.responses import Response

from gyrfalcon import errors
from gyrfalcon.http.auth import caller_of
from gyrfalcon.http.openapi import json_body
from gyrfalcon.http.overload import GeneratingRoute, Streams
from gyrfalcon.http.search_parameters import search_arguments
from gyrfalcon.http.settings import HttpSettings
from gyrfalcon.http.tgi_render import (
    STOPPED_EVENT,
    render_completion,
    render_compute_headers,
    render_error,
    render_events,
    render_info,
    render_spans,
    render_timings,
)
from gyrfalcon.http.tgi_schema import (
    CHAT_EXAMPLE,
    EXAMPLE,
    ChatTokenizeRequest,
    ChatTokenizeResponse,
    CompatGenerateRequest,
    ErrorResponse,
    GenerateRequest,
    GenerateResponse,
    Info,
    SimpleToken,
    StreamResponse,
    TurnContent,
)
from gyrfalcon.http.wire import (
    EventStream,
    count_failure,
    json_response,
    large_json_response,
    parse_body,
    read_json,
    sse,
    unless_gone,
)
from gyrfalcon.metrics import Metrics
from gyrfalcon.service.interface import ChatMessage, ChatPrompt, GenerateCall, TextService
from gyrfalcon.telemetry import new_request_id
from gyrfalcon.tracing import trace_headers

TAGS: list[str | Enum] = ["Text Generation Inference"]
MOST_EVENTS_OF_A_WRITE = 64
# Parameters of the dialect that this version cannot honour: refused unless null.
NOT_HONOURED = ("grammar", "adapter_id")
# Types that no route declares: bodies are read by hand, events are written by hand.
SCHEMAS = (GenerateRequest, CompatGenerateRequest, StreamResponse, ChatTokenizeRequest)
GENERATING = {
    "/generate": GeneratingRoute(render_error, Streams.NEVER),
    "/generate_stream": GeneratingRoute(render_error, Streams.ALWAYS),
    "/": GeneratingRoute(render_error, Streams.IF_ASKED),
}

FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": description}
    for status, description in (
        (400, "The body is not JSON"),
        (401, "The API key is missing or wrong"),
        (404, "The model is not served"),
        (413, "The body is too large"),
        (415, "The content type is not JSON"),
        (422, "A parameter breaks a rule"),
        (424, "The generation failed"),
        (429, "The model is overloaded"),
        (503, "The model is not ready"),
    )
}
STREAM_ANSWER: dict[str, Any] = {
    "description": "A stream of events, one a token: `data: {json}`",
    "content": {"text/event-stream": {"schema": {"$ref": "#/components/schemas/StreamResponse"}}},
}
LIST_OR_STREAM = {
    "model": list[GenerateResponse],
    **STREAM_ANSWER,
    "description": "One answer in a list, or a stream",
}


class TgiDialect:
    """Translates between this dialect and the service."""

    def __init__(self, service: TextService, settings: HttpSettings, metrics: Metrics) -> None:
        self._service = service
        self._settings = settings
        self._metrics = metrics
        self._body_limits = settings.body_limits

    def add_routes(self, app: FastAPI) -> None:
        add_post(app, "/generate", self.generate, GenerateRequest, "Generate text", {"model": GenerateResponse})
        add_post(
            app,
            "/generate_stream",
            self.generate_stream,
            GenerateRequest,
            "Generate a stream of tokens",
            STREAM_ANSWER,
        )
        add_post(
            app,
            "/",
            self.compat_generate,
            CompatGenerateRequest,
            "Generate text, as a list of one answer, or a stream",
            LIST_OR_STREAM,
        )
        add_post(
            app,
            "/tokenize",
            self.tokenize,
            GenerateRequest,
            "The tokens of a text, with the bytes each came from",
            {"model": list[SimpleToken]},
        )
        add_post(
            app,
            "/chat_tokenize",
            self.chat_tokenize,
            ChatTokenizeRequest,
            "A conversation as the model's template writes it, and its tokens",
            {"model": ChatTokenizeResponse},
            example=CHAT_EXAMPLE,
        )
        for path in ("/", "/health", "/ping"):
            self.add_health(app, path)
        app.add_api_route(
            "/info",
            self.info,
            methods=["GET"],
            summary="Model and limits",
            tags=TAGS,
            response_model=None,
            responses={200: {"model": Info}},
        )

    def add_health(self, app: FastAPI, path: str) -> None:
        """Tell the model's health at this path."""
        health: dict[int | str, dict[str, Any]] = {
            200: {"description": "The model serves requests"},
            503: {"model": ErrorResponse, "description": "It does not"},
        }
        app.add_api_route(
            path, self.health, methods=["GET"], summary="Health", tags=TAGS, response_model=None, responses=health
        )

    async def generate(self, request: Request) -> Response:
        try:
            body = parse_body(await self.read(request), GenerateRequest)
            return await self.answer(request, body, bool(body.parameters.return_full_text), as_list=False)
        except Exception as error:
            return self.failure(error)

    async def generate_stream(self, request: Request) -> Response:
        try:
            body = parse_body(await self.read(request), GenerateRequest)
            return self.stream(request, body, bool(body.parameters.return_full_text))
        except Exception as error:
            return self.failure(error)

    async def compat_generate(self, request: Request) -> Response:
        try:
            return await self.answer_compat(request, await self.read(request))
        except Exception as error:
            return self.failure(error)

    async def tokenize(self, request: Request) -> Response:
        """Only the text matters; no limit on its length but that of the body."""
        try:
            body = parse_body(await self.read(request), GenerateRequest)
            spans = await self._service.tokenize(body.inputs, model=body.model)
            return await large_json_response(lambda: render_spans(spans), len(spans))
        except Exception as error:
            return self.failure(error)

    async def chat_tokenize(self, request: Request) -> Response:
        """The template brings the special tokens it wants; none are added."""
        try:
            body = parse_body(await self.read(request), ChatTokenizeRequest)
            text = await self._service.render_chat(to_conversation(body), model=body.model)
            spans = await self._service.tokenize(text, model=body.model, add_special_tokens=False)
            return await large_json_response(
                lambda: {"tokenize_response": render_spans(spans), "templated_text": text}, len(spans)
            )
        except Exception as error:
            return self.failure(error)

    async def health(self) -> Response:
        health = await self._service.health()
        if health.is_healthy:
            return Response(status_code=200)
        return json_response({"error": "unhealthy", "error_type": "healthcheck"}, 503)

    async def info(self) -> Response:
        return json_response(render_info(self._service.models))

    async def read(self, request: Request) -> Any:
        """The request's body as plain values. Raises MalformedBody."""
        return await read_json(request, self._body_limits)

    async def answer_compat(self, request: Request, value: Any) -> Response:
        """What `POST /` answers, which the hub's clients call: the prompt is part of the text unless declined."""
        body = parse_body(value, CompatGenerateRequest)
        returns_prompt = body.parameters.return_full_text is not False
        if body.stream:
            return self.stream(request, body, returns_prompt)
        return await self.answer(request, body, returns_prompt, as_list=True)

    async def answer(self, request: Request, body: GenerateRequest, returns_prompt: bool, *, as_list: bool) -> Response:
        call = self.call(body, request)
        completion = await unless_gone(request, self._service.complete(call))
        headers = self._headers(call, body) | render_timings(completion)

        def render() -> object:
            answer = render_completion(completion, body, returns_prompt)
            return [answer] if as_list else answer

        num_tokens = completion.num_prompt_tokens + completion.num_generated_tokens
        return await large_json_response(
            render, num_tokens * (1 + (body.parameters.top_n_tokens or 0)), headers=headers
        )

    def stream(self, request: Request, body: GenerateRequest, returns_prompt: bool) -> Response:
        """A stream, also of the one event that says what is wrong with the body's meaning."""
        settings = self._settings
        prompt = body.inputs if returns_prompt else ""
        try:
            call = self.call(body, request, is_stream=True)
        except errors.RequestError as error:
            return EventStream(_only(sse(render_error(error)[1])))
        return EventStream(
            self._events(call, prompt, body.parameters.details),
            headers=self._headers(call, body),
            ping_s=settings.ping_s,
            stall_s=settings.stall_s,
            last_words=STOPPED_EVENT,
            on_abort=self._metrics.request_aborted,
        )

    def call(self, body: GenerateRequest, request: Request, *, is_stream: bool = False) -> GenerateCall:
        """The body as a call. Raises InvalidRequest, which counts as the service's own refusals do."""
        try:
            if is_stream:
                _check_one_sequence(body)
            return to_call(body, request)
        except errors.InvalidRequest:
            self._metrics.request_begins()
            self._metrics.request_failed("validation")
            raise

    def failure(self, error: Exception) -> Response:
        """The answer to a request that failed before it was answered."""
        count_failure(self._metrics, error)
        status, body, headers = render_error(error)
        return json_response(body, status, headers)

    async def _events(self, call: GenerateCall, prompt: str, has_details: bool) -> AsyncGenerator[bytes, None]:
        """The stream's events, those that are ready together in one chunk; what fails is its last event."""
        try:
            async with aclosing(self._service.stream(call)) as batches:
                async for deltas in batches:
                    # A client that was slow finds many: they go out in writes of which each can be waited for.
                    for start in range(0, len(deltas), MOST_EVENTS_OF_A_WRITE):
                        yield render_events(deltas[start : start + MOST_EVENTS_OF_A_WRITE], prompt, has_details)
        except Exception as error:
            yield sse(render_error(error)[1])

    def _headers(self, call: GenerateCall, body: GenerateRequest) -> dict[str, str]:
        headers = {"x-request-id": call.request_id or ""}
        try:
            model = self._service.resolve(body.model)
        except errors.UnknownModel:
            return headers  # the stream's only event says what is wrong
        return headers | render_compute_headers(body, model, self._settings.compute_type)


async def _only(chunk: bytes) -> AsyncGenerator[bytes, None]:
    yield chunk


def add_post(
    app: FastAPI,
    path: str,
    endpoint: Any,
    body: type[BaseModel],
    summary: str,
    success: dict[str, Any],
    *,
    example: dict[str, Any] = EXAMPLE,
) -> None:
    """Add a route that takes a body of this type and may fail in this dialect's ways."""
    app.add_api_route(
        path,
        endpoint,
        methods=["POST"],
        summary=summary,
        tags=TAGS,
        response_model=None,
        responses={**FAILURES, 200: success},
        openapi_extra=json_body(body, example),
    )


def to_call(body: GenerateRequest, request: Request) -> GenerateCall:
    """The body in our own parameter names; of the request its trace context. Raises NotSupported."""
    parameters = body.parameters
    for name in NOT_HONOURED:
        if getattr(parameters, name) is not None:
            raise errors.NotSupported(name, f"`{name}` is not supported by this version; leave it out or send null")
    return GenerateCall(
        prompt=body.inputs,
        model=body.model,
        request_id=new_request_id(),
        trace_headers=trace_headers(request.headers),
        caller=caller_of(request),
        best_of=parameters.best_of,
        # Here false only means that nothing asks for sampling yet.
        do_sample=parameters.do_sample or None,
        frequency_penalty=parameters.frequency_penalty,
        max_new_tokens=parameters.max_new_tokens,
        min_length=parameters.min_length,
        min_new_tokens=parameters.min_new_tokens,
        prompt_logprobs=parameters.decoder_input_details,
        repetition_penalty=parameters.repetition_penalty,
        seed=parameters.seed,
        stop=tuple(parameters.stop),
        temperature=parameters.temperature,
        top_k=parameters.top_k,
        top_n=parameters.top_n_tokens,
        top_p=parameters.top_p,
        truncate=parameters.truncate,
        typical_p=parameters.typical_p,
        watermark=parameters.watermark,
        **search_arguments(parameters),
    )


def _check_one_sequence(body: GenerateRequest) -> None:
    """A stream's events do not tell several sequences apart."""
    sequences = body.parameters.num_return_sequences
    if sequences is not None and sequences > 1:
        raise errors.InvalidRequest(
            "num_return_sequences", f"`num_return_sequences` > 1 is not allowed when streaming. Given: {sequences}"
        )


def to_conversation(body: ChatTokenizeRequest) -> ChatPrompt:
    """The conversation, the parts of a message's text joined. Raises NotSupported."""
    if body.tools:
        raise errors.NotSupported("tools", "`tools` is not supported by this version; leave it out or send null")
    return ChatPrompt(tuple(ChatMessage(turn.role, _content_text(turn.content)) for turn in body.messages))


def _content_text(content: TurnContent) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
