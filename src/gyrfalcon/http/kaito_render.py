"""Answers in KAITO's dialect: results, details, events, errors."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from starlette.responses import Response

from gyrfalcon import errors
from gyrfalcon.http.kaito_schema import ChatRequest
from gyrfalcon.http.wire import ClientGone, MalformedBody, ServerStopping, json_response, sse
from gyrfalcon.service.interface import Choice, Delta, FinishReason

logger = logging.getLogger(__name__)

FINISH_REASONS = {FinishReason.LENGTH: "length", FinishReason.EOS: "eos_token", FinishReason.STOP: "stop_sequence"}
# Our name of a parameter to this dialect's, where they differ.
WIRE_NAMES = {"stop_token_ids": "eos_token_id"}
# What a stream says that the server's end has cut.
STOPPED_EVENT = sse({"detail": str(ServerStopping())})

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


def render_answer(
    choices: Sequence[Choice], num_prompt_tokens: int, body: ChatRequest, prompt: str | None
) -> dict[str, Any]:
    """A `ChatResponse`; `details` is absent unless asked for. prompt: the text continued, None of a conversation."""
    texts = [choice.text for choice in choices]
    if body.clean_up_tokenization_spaces:
        texts = [clean_up_spaces(text) for text in texts]
    answer: dict[str, Any] = {"Result": _joined(texts, body, prompt)}
    if body.details:
        kwargs = body.generate_kwargs
        with_scores = kwargs is not None and (kwargs.output_scores or kwargs.return_dict_in_generate)
        sequences = [
            _sequence(choice, text, with_scores=with_scores) for choice, text in zip(choices, texts, strict=True)
        ]
        answer["details"] = {"prompt_tokens": num_prompt_tokens, "sequences": sequences}
    return answer


def render_deltas(deltas: Sequence[Delta]) -> bytes:
    """A stream's events, one a token; special tokens are no text."""
    events = [{"Delta": "" if d.token.special else d.token.text, "sequence": d.choice} for d in deltas]
    return b"".join(map(sse, events))


def clean_up_spaces(text: str) -> str:
    """The text without the spaces that tokenised text has before punctuation and contractions."""
    for spaced, clean in CLEANED_SPACES:
        text = text.replace(spaced, clean)
    return text


def failure(error: Exception) -> Response:
    """The answer to a request that failed, in this dialect."""
    status, body, headers = render_failure(error)
    return json_response(body, status, headers)


def render_failure(error: Exception) -> tuple[int, dict[str, object], dict[str, str]]:
    """An error's status, body and headers in this dialect."""
    status, detail, headers = render_error(error)
    return status, {"detail": detail}, headers


def render_error(error: Exception) -> tuple[int, object, dict[str, str]]:
    """An error's status, detail and headers in this dialect."""
    headers: dict[str, str] = {}
    detail: object = str(error)
    match error:
        case MalformedBody():
            # The service behind this dialect answered 422 to whatever it could not read.
            status = 422 if error.status == 400 else error.status
            detail = [{"loc": ["body", *error.loc], "msg": str(error), "type": error.kind}]
        case errors.InvalidRequest():
            status, wire_name = 422, WIRE_NAMES.get(error.parameter, error.parameter)
            detail = str(error).replace(f"`{error.parameter}`", f"`{wire_name}`")
        case errors.RequestError():
            status = 422
        case errors.QueueTimeout():
            status = 503
            headers["Retry-After"] = str(error.retry_after_s)
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
    return status, detail, headers


def _joined(texts: Sequence[str], body: ChatRequest, prompt: str | None) -> str:
    """The texts with nothing in between; of a conversation, the answer as a message.

    The message is in Python's notation, which is what clients of the conversational form have to read.
    """
    if prompt is None:
        return "".join(str({"role": "assistant", "content": text}) for text in texts)
    shown = "" if body.return_full_text is False else prompt
    return "".join(shown + text for text in texts)


def _sequence(choice: Choice, text: str, *, with_scores: bool) -> dict[str, Any]:
    details: dict[str, Any] = {
        "generated_text": text,
        "generated_tokens": len(choice.tokens),
        "finish_reason": FINISH_REASONS[choice.finish_reason],
        "seed": choice.seed,
    }
    if with_scores:
        details["sequence"] = [token.id for token in choice.tokens]
        # As single precision, whose shortest form is what they are worth.
        details["scores"] = [np.float32(token.logprob) for token in choice.tokens]
        details["sequences_scores"] = None if choice.score is None else np.float32(choice.score)
        details["beam_indices"] = None if choice.beam_indices is None else list(choice.beam_indices)
    return details
