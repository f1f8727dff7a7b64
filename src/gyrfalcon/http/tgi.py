"""The dialect of text-generation-inference: /generate, /generate_stream, /, /info, /health."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from enum import Enum
from typing import Any
from urllib.parse import quote as percent_encode

from fastapi import FastAPI, Request
from starlette.responses import Response

from gyrfalcon import __version__, errors
from gyrfalcon.http.openapi import json_body
from gyrfalcon.http.settings import HttpSettings
from gyrfalcon.http.tgi_schema import (
    EXAMPLE,
    Body,
    CompatGenerateRequest,
    ErrorResponse,
    GenerateRequest,
    GenerateResponse,
    Info,
    StreamResponse,
)
from gyrfalcon.http.wire import (
    BodyLimits,
    ClientGone,
    EventStream,
    MalformedBody,
    json_response,
    parse_body,
    read_json,
    single,
    sse,
    unless_gone,
)
from gyrfalcon.service.interface import (
    Choice,
    Completion,
    Delta,
    FinishReason,
    GenerateCall,
    GeneratedToken,
    ModelInfo,
    PromptToken,
    TextService,
)
from gyrfalcon.telemetry import new_request_id

logger = logging.getLogger(__name__)

TAGS: list[str | Enum] = ["Text Generation Inference"]
FINISH_REASONS = {
    FinishReason.LENGTH: "length",
    FinishReason.EOS: "eos_token",
    FinishReason.STOP: "stop_sequence",
}
# Our name of a parameter to this dialect's, where they differ.
WIRE_NAMES = {"prompt": "inputs", "top_n": "top_n_tokens", "prompt_logprobs": "decoder_input_details"}
BODY_ERROR_TYPES = {
    400: "bad_request",
    408: "request_timeout",
    413: "payload_too_large",
    415: "unsupported_media_type",
    422: "validation",
}
# Parameters of the dialect that this version cannot honour: refused unless null.
NOT_HONOURED = ("grammar", "adapter_id")

# Types that no route declares: bodies are read by hand, events are written by hand.
SCHEMAS = (GenerateRequest, CompatGenerateRequest, StreamResponse)


class TgiDialect:
    """Translates between this dialect and the service."""

    def __init__(self, service: TextService, settings: HttpSettings) -> None:
        self._service = service
        self._settings = settings
        self._body_limits = BodyLimits(max_bytes=settings.payload_limit, timeout_s=settings.body_timeout_s)

    def add_routes(self, app: FastAPI) -> None:
        failures: dict[int | str, dict[str, Any]] = {
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
        stream_answer = {
            "description": "A stream of events, one a token: `data: {json}`",
            "content": {"text/event-stream": {"schema": {"$ref": "#/components/schemas/StreamResponse"}}},
        }

        def post(path: str, endpoint: Any, body: type[Body], summary: str, success: dict[str, Any]) -> None:
            app.add_api_route(
                path,
                endpoint,
                methods=["POST"],
                summary=summary,
                tags=TAGS,
                response_model=None,
                responses={**failures, 200: success},
                openapi_extra=json_body(body, EXAMPLE),
            )

        post("/generate", self.generate, GenerateRequest, "Generate text", {"model": GenerateResponse})
        post("/generate_stream", self.generate_stream, GenerateRequest, "Generate a stream of tokens", stream_answer)
        post(
            "/",
            self.compat_generate,
            CompatGenerateRequest,
            "Generate text, as a list of one answer, or a stream",
            {"model": list[GenerateResponse], **stream_answer, "description": "One answer in a list, or a stream"},
        )
        health: dict[int | str, dict[str, Any]] = {
            200: {"description": "The model serves requests"},
            503: {"model": ErrorResponse, "description": "It does not"},
        }
        for path in ("/", "/health", "/ping"):
            app.add_api_route(
                path, self.health, methods=["GET"], summary="Health", tags=TAGS, response_model=None, responses=health
            )
        app.add_api_route(
            "/info",
            self.info,
            methods=["GET"],
            summary="Model and limits",
            tags=TAGS,
            response_model=None,
            responses={200: {"model": Info}},
        )

    async def generate(self, request: Request) -> Response:
        try:
            body = parse_body(await read_json(request, self._body_limits), GenerateRequest)
            return await self._answer(request, body, bool(body.parameters.return_full_text), as_list=False)
        except Exception as error:
            return failure(error)

    async def generate_stream(self, request: Request) -> Response:
        try:
            body = parse_body(await read_json(request, self._body_limits), GenerateRequest)
            return self._stream(body, bool(body.parameters.return_full_text))
        except Exception as error:
            return failure(error)

    async def compat_generate(self, request: Request) -> Response:
        """`POST /`, which the hub's clients call: the prompt is part of the text unless declined."""
        try:
            body = parse_body(await read_json(request, self._body_limits), CompatGenerateRequest)
            returns_prompt = body.parameters.return_full_text is not False
            if body.stream:
                return self._stream(body, returns_prompt)
            return await self._answer(request, body, returns_prompt, as_list=True)
        except Exception as error:
            return failure(error)

    async def health(self) -> Response:
        health = await self._service.health()
        if health.is_healthy:
            return Response(status_code=200)
        return json_response({"error": "unhealthy", "error_type": "healthcheck"}, 503)

    async def info(self) -> Response:
        return json_response(render_info(self._service.models))

    async def _answer(
        self, request: Request, body: GenerateRequest, returns_prompt: bool, *, as_list: bool
    ) -> Response:
        call = to_call(body)
        completion = await unless_gone(request, self._service.complete(call))
        answer = render_completion(completion, body, returns_prompt)
        headers = self._headers(call, body) | render_timings(completion)
        return json_response([answer] if as_list else answer, headers=headers)

    def _stream(self, body: GenerateRequest, returns_prompt: bool) -> Response:
        call = to_call(body)
        events = self._events(call, body, body.inputs if returns_prompt else "")
        settings = self._settings
        return EventStream(events, headers=self._headers(call, body), ping_s=settings.ping_s, stall_s=settings.stall_s)

    async def _events(self, call: GenerateCall, body: GenerateRequest, prompt: str) -> AsyncGenerator[bytes, None]:
        """The stream's events, those that are ready together in one chunk; what fails is its last event."""
        has_details = body.parameters.details
        try:
            async with aclosing(self._service.stream(call)) as batches:
                async for deltas in batches:
                    yield b"".join([sse(render_delta(delta, prompt, has_details)) for delta in deltas])
        except Exception as error:
            yield sse(render_error(error)[1])

    def _headers(self, call: GenerateCall, body: GenerateRequest) -> dict[str, str]:
        """What every answer tells, also one that has only begun."""
        request_id = {"x-request-id": call.request_id or ""}
        try:
            model = self._service.resolve(body.model)
        except errors.UnknownModel:
            return request_id  # the stream's only event says what is wrong
        return request_id | {
            "x-compute-type": self._settings.compute_type or model.device,
            "x-compute-characters": str(len(body.inputs)),
            "x-model-id": percent_encode(model.name, safe="/-_.:@ "),
        }


def to_call(body: GenerateRequest) -> GenerateCall:
    """The body in our own parameter names. Raises NotSupported."""
    parameters = body.parameters
    for name in NOT_HONOURED:
        if getattr(parameters, name) is not None:
            raise errors.NotSupported(name, f"`{name}` is not supported by this version; leave it out or send null")
    return GenerateCall(
        prompt=body.inputs,
        model=body.model,
        request_id=new_request_id(),
        best_of=parameters.best_of,
        # Here false only means that nothing asks for sampling yet.
        do_sample=parameters.do_sample or None,
        frequency_penalty=parameters.frequency_penalty,
        max_new_tokens=parameters.max_new_tokens,
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
    )


def render_completion(completion: Completion, body: GenerateRequest, returns_prompt: bool) -> dict[str, Any]:
    """A `GenerateResponse`; members that were not asked for are absent, not null."""
    prompt = body.inputs if returns_prompt else ""
    best, *others = completion.choices
    answer: dict[str, Any] = {"generated_text": prompt + best.text}
    if body.parameters.details or body.parameters.decoder_input_details:
        prefill = [_prefill_token(token) for token in completion.prompt or ()]
        details = _sequence(best, prefill)
        if (body.parameters.best_of or 1) > 1:
            details["best_of_sequences"] = [
                {"generated_text": prompt + choice.text, **_sequence(choice, prefill)} for choice in others
            ]
        answer["details"] = details
    return answer


def render_timings(completion: Completion) -> dict[str, str]:
    """Headers that tell what the answer cost."""
    timings = completion.timings
    num_tokens = len(completion.choices[0].tokens)
    return {
        "x-compute-time": f"{timings.total_s:.6f}",
        "x-total-time": _milliseconds(timings.total_s),
        "x-validation-time": _milliseconds(timings.validation_s),
        "x-queue-time": _milliseconds(timings.queue_s),
        "x-inference-time": _milliseconds(timings.inference_s),
        "x-time-per-token": _milliseconds(timings.inference_s / num_tokens),
        "x-prompt-tokens": str(completion.num_prompt_tokens),
        "x-generated-tokens": str(num_tokens),
    }


def render_delta(delta: Delta, prompt: str, has_details: bool) -> dict[str, Any]:
    """A `StreamResponse`; `prompt` is put in front of the final text."""
    event: dict[str, Any] = {"index": delta.index, "token": _token(delta.token)}
    if delta.token.top is not None:
        event["top_tokens"] = [_token(token) for token in delta.token.top]
    end = delta.end
    event["generated_text"] = None if end is None else prompt + end.text
    event["details"] = None
    if end is not None and has_details:
        event["details"] = {
            "finish_reason": FINISH_REASONS[end.finish_reason],
            "generated_tokens": end.num_tokens,
            "seed": end.seed,
            "input_length": end.num_prompt_tokens,
        }
    return event


def render_info(models: Sequence[ModelInfo]) -> dict[str, Any]:
    """An `Info`, with the names that older dashboards read; about the default model where several are served."""
    model = models[0]
    return {
        "model_id": model.name,
        "model_sha": model.revision,
        "model_pipeline_tag": "text-generation",
        "model_dtype": model.dtype,
        "model_device_type": model.device,
        "max_concurrent_requests": model.max_concurrent_requests,
        "max_best_of": model.max_best_of,
        "max_stop_sequences": model.max_stop_sequences,
        "max_top_n_tokens": model.max_top_n_tokens,
        "max_input_tokens": model.max_input_tokens,
        "max_input_length": model.max_input_tokens,
        "max_total_tokens": model.max_total_tokens,
        "max_batch_total_tokens": model.cache_tokens,
        "default_max_new_tokens": model.default_max_new_tokens,
        "validation_workers": min(32, (os.cpu_count() or 1) + 4),  # threads of the event loop's executor
        "max_client_batch_size": 1,  # a request holds one prompt
        "router": "gyrfalcon",
        "version": __version__,
        "sha": None,
        "docker_label": None,
        "models": [served.name for served in models],
    }


def render_error(error: Exception) -> tuple[int, dict[str, str], dict[str, str]]:
    """An error's status, body and headers in this dialect."""
    headers: dict[str, str] = {}
    match error:
        case MalformedBody():
            status, kind, text = error.status, BODY_ERROR_TYPES[error.status], str(error)
        case errors.TemplateError():
            status, kind, text = 422, "template_error", f"Template error: {error}"
        case errors.InvalidRequest():
            status, kind, text = 422, "validation", f"Input validation error: {_in_wire_names(error)}"
        case errors.UnknownModel():
            status, kind, text = 404, "model_not_found", str(error)
        case errors.Overloaded():
            status, kind, text = 429, "overloaded", str(error)
            headers["Retry-After"] = str(error.retry_after_s)
        case errors.GenerationFailed():
            status, kind, text = 424, "generation", f"Request failed during generation: {error}"
        case errors.EngineDead():
            status, kind, text = 503, "generation", f"Request failed during generation: {error}"
            headers["Retry-After"] = "5"
        case ClientGone():
            status, kind, text = 499, "dropped", "the client closed the connection"
        case _:
            logger.error("request failed unexpectedly", exc_info=error)
            status, kind, text = 500, "internal", "internal server error"
    return status, {"error": text, "error_type": kind}, headers


def failure(error: Exception) -> Response:
    """The answer to a request that failed before it was answered."""
    status, body, headers = render_error(error)
    return json_response(body, status, headers)


def _in_wire_names(error: errors.InvalidRequest) -> str:
    if isinstance(error, errors.PromptTooLong):
        # Clients search for the beginnings of these two sentences.
        if error.max_new_tokens is None:
            return f"`inputs` must have less than {error.limit} tokens. Given: {error.num_tokens}"
        return (
            f"`inputs` tokens + `max_new_tokens` must be <= {error.limit}. "
            f"Given: {error.num_tokens} `inputs` tokens and {error.max_new_tokens} `max_new_tokens`"
        )
    name = WIRE_NAMES.get(error.parameter, error.parameter)
    return str(error).replace(f"`{error.parameter}`", f"`{name}`")


def _sequence(choice: Choice, prefill: list[dict[str, Any]]) -> dict[str, Any]:
    sequence: dict[str, Any] = {
        "finish_reason": FINISH_REASONS[choice.finish_reason],
        "generated_tokens": len(choice.tokens),
        "seed": choice.seed,
        "prefill": prefill,
        "tokens": [_token(token) for token in choice.tokens],
    }
    tops = [token.top for token in choice.tokens if token.top is not None]
    if tops:
        sequence["top_tokens"] = [[_token(token) for token in top] for top in tops]
    return sequence


def _token(token: GeneratedToken) -> dict[str, Any]:
    return {"id": token.id, "text": token.text, "logprob": single(token.logprob), "special": token.special}


def _prefill_token(token: PromptToken) -> dict[str, Any]:
    logprob = None if token.logprob is None else single(token.logprob)
    return {"id": token.id, "text": token.text, "logprob": logprob}


def _milliseconds(seconds: float) -> str:
    return str(round(seconds * 1000))
