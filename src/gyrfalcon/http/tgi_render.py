"""Answers in the dialect of text-generation-inference: completions, events, headers, errors."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote as percent_encode

import numpy as np

from gyrfalcon import __version__, errors
from gyrfalcon.http.tgi_schema import GenerateRequest
from gyrfalcon.http.wire import ClientGone, MalformedBody, ServerStopping, sse
from gyrfalcon.service.interface import (
    Choice,
    Completion,
    Delta,
    FinishReason,
    GeneratedToken,
    ModelInfo,
    PromptToken,
    TextSpan,
)

logger = logging.getLogger(__name__)

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
# What a stream says that the server's end has cut.
STOPPED_EVENT = sse({"error": "the server is shutting down", "error_type": "incomplete_generation_stream"})


def render_completion(completion: Completion, body: GenerateRequest, returns_prompt: bool) -> dict[str, Any]:
    """A `GenerateResponse`; members that were not asked for are absent, not null."""
    prompt = body.inputs if returns_prompt else ""
    best, *others = completion.choices
    answer: dict[str, Any] = {"generated_text": prompt + best.text}
    if body.parameters.details or body.parameters.decoder_input_details:
        prefill = [_prefill_token(token) for token in completion.prompt or ()]
        details = _sequence(best, prefill)
        if others or (body.parameters.best_of or 1) > 1:
            details["best_of_sequences"] = [
                {"generated_text": prompt + choice.text, **_sequence(choice, prefill)} for choice in others
            ]
        answer["details"] = details
    return answer


def render_events(deltas: Sequence[Delta], prompt: str, has_details: bool) -> bytes:
    """A stream's events, one a token. `prompt` is put in front of the final text; `has_details` ends with details."""
    return b"".join([sse(_event(delta, prompt, has_details)) for delta in deltas])


def render_compute_headers(body: GenerateRequest, model: ModelInfo, compute_type: str | None) -> dict[str, str]:
    """What every answer tells, also one that has only begun."""
    return {
        "x-compute-type": compute_type or model.device,
        "x-compute-characters": str(len(body.inputs)),
        "x-model-id": percent_encode(model.name, safe="/-_.:@ "),
    }


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


def render_spans(spans: Sequence[TextSpan]) -> list[dict[str, Any]]:
    """A text's tokens with the bytes each came from."""
    return [{"id": span.id, "text": span.text, "start": span.start, "stop": span.stop} for span in spans]


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
        case errors.QueueTimeout():
            status, kind, text = 503, "overloaded", str(error)
            headers["Retry-After"] = str(error.retry_after_s)
        case errors.Overloaded():
            status, kind, text = 429, "overloaded", str(error)
            headers["Retry-After"] = str(error.retry_after_s)
        case errors.GenerationFailed():
            status, kind, text = 424, "generation", f"Request failed during generation: {error}"
        case errors.EngineDead():
            status, kind, text = 503, "generation", f"Request failed during generation: {error}"
            headers["Retry-After"] = "5"
        case ServerStopping():
            status, kind, text = 503, "incomplete_generation", str(error)
            headers["Retry-After"] = "5"
        case ClientGone():
            status, kind, text = 499, "dropped", "the client closed the connection"
        case _:
            logger.error("request failed unexpectedly", exc_info=error)
            status, kind, text = 500, "internal", "internal server error"
    return status, {"error": text, "error_type": kind}, headers


def _in_wire_names(error: errors.InvalidRequest) -> str:
    if isinstance(error, errors.PromptTooLong):
        # Clients search for the beginnings of these two sentences.
        if error.max_new_tokens is None:
            return f"`inputs` must have less than {error.limit} tokens. Given: {error.length.removesuffix(' tokens')}"
        return (
            f"`inputs` tokens + `max_new_tokens` must be <= {error.limit}. "
            f"Given: {_in_inputs(error.length)} and {error.max_new_tokens} `max_new_tokens`"
        )
    name = WIRE_NAMES.get(error.parameter, error.parameter)
    return str(error).replace(f"`{error.parameter}`", f"`{name}`")


def _in_inputs(length: str) -> str:
    number, unit = length.split(" ", 1)
    return f"{number} `inputs` {unit}"


def _event(delta: Delta, prompt: str, has_details: bool) -> dict[str, Any]:
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
    # Numbers have as many digits as single precision has.
    return {"id": token.id, "text": token.text, "logprob": np.float32(token.logprob), "special": token.special}


def _prefill_token(token: PromptToken) -> dict[str, Any]:
    logprob = None if token.logprob is None else np.float32(token.logprob)
    return {"id": token.id, "text": token.text, "logprob": logprob}


def _milliseconds(seconds: float) -> str:
    return str(round(seconds * 1000))
