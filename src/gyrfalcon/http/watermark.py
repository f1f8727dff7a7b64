"""POST /watermark/detect: whether a text carries a watermark. A route of our own; its errors look as TGI's do."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from gyrfalcon import errors
from gyrfalcon.http.openapi import json_body
from gyrfalcon.http.settings import HttpSettings
from gyrfalcon.http.tgi_render import render_error
from gyrfalcon.http.tgi_schema import ErrorResponse
from gyrfalcon.http.wire import (
    count_failure,
    json_response,
    parse_body,
    read_json,
    unless_gone,
)
from gyrfalcon.metrics import Metrics
from gyrfalcon.service.interface import DetectCall, Detection, TextService, TokenPrompt

PATH = "/watermark/detect"
EXAMPLE = {"text": "Return the number of items in the sequence.", "alpha": 0.0001}
Finite = Annotated[float, Field(allow_inf_nan=False)]


class DetectRequest(BaseModel):
    """A text, as text or as token ids, and by which keys to judge it. Null is as good as absent."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    text: str | None = Field(None, description="The text; this or `token_ids`.")
    token_ids: list[int] | None = Field(None, description="The text as ids of the model's tokenizer.")
    prompt: str | None = Field(None, description="What the text went on from: lets its first token be scored.")
    prompt_token_ids: list[int] | None = Field(None, description="The same as ids; this or `prompt`.")
    model: str | None = Field(None, description="Which of the served models; null for the default one.")
    keys: list[int] | None = Field(
        None, description="Watermark keys to try, all different; null for the server's own, which no answer shows."
    )
    gamma: Finite | None = Field(None, description="Share of green tokens; null for the server's setting.")
    alpha: Finite | None = Field(
        None, description="False-positive rate of the decision, all keys together; null for 0.0001."
    )
    ignore_repeated: bool = Field(True, description="Score a token after the same token once only.")


class KeyResult(BaseModel):
    """What one key says; null where no token could be scored."""

    is_watermarked: bool | None = Field(description="Whether `corrected_p_value` is at most alpha")
    green_tokens: int
    green_fraction: float | None
    z_score: float | None
    p_value: float
    corrected_p_value: float = Field(description="Corrected for the number of keys (Šidák)")
    green: list[bool | None] = Field(description="For each token; null where it has no context")


class TokenResult(BaseModel):
    """One token of the text."""

    id: int
    text: str
    is_scored: bool


class DetectResponse(BaseModel):
    """What the keys say, in the order they were given in."""

    model: str
    gamma: float
    alpha: float
    tokens_scored: int
    is_watermarked: bool | None = Field(description="By any key; null: cannot be said, see `reason`")
    reason: str | None
    keys: list[KeyResult]
    tokens: list[TokenResult]


# Types that no route declares.
SCHEMAS = (DetectRequest,)


class WatermarkRoute:
    """Translates between the route and the service."""

    def __init__(self, service: TextService, settings: HttpSettings, metrics: Metrics) -> None:
        self._service = service
        self._metrics = metrics
        self._body_limits = settings.body_limits

    def add_routes(self, app: FastAPI) -> None:
        failures: dict[int | str, dict[str, Any]] = {
            status: {"model": ErrorResponse, "description": description}
            for status, description in (
                (400, "The body is not JSON"),
                (401, "The API key is missing or wrong"),
                (404, "The model is not served"),
                (413, "The body is too large"),
                (415, "The content type is not JSON"),
                (422, "A member breaks a rule"),
            )
        }
        app.add_api_route(
            PATH,
            self.detect,
            methods=["POST"],
            tags=["Watermark"],
            summary="Find out whether a text carries a watermark",
            response_model=None,
            responses={**failures, 200: {"model": DetectResponse}},
            openapi_extra=json_body(DetectRequest, EXAMPLE),
        )

    async def detect(self, request: Request) -> Response:
        try:
            body = parse_body(await read_json(request, self._body_limits), DetectRequest)
            found = await unless_gone(request, self._service.detect(_to_call(body)))
            # In a thread: flags of every token under every key may take a while to write.
            return await asyncio.to_thread(lambda: json_response(_render(found)))
        except Exception as error:
            count_failure(self._metrics, error)
            status, answer, headers = _render_error(error)
            return json_response(answer, status, headers)


def _to_call(body: DetectRequest) -> DetectCall:
    """The body as the service wants it. Raises InvalidRequest where it holds no text, or two."""
    text = _either(body.text, body.token_ids, ("text", "token_ids"))
    if text is None:
        raise errors.InvalidRequest("text", "`text` or `token_ids` must be given")
    return DetectCall(
        text=text,
        prompt=_either(body.prompt, body.prompt_token_ids, ("prompt", "prompt_token_ids")),
        model=body.model,
        keys=None if body.keys is None else tuple(body.keys),
        gamma=body.gamma,
        alpha=body.alpha,
        ignore_repeated=body.ignore_repeated,
    )


def _either(text: str | None, ids: list[int] | None, names: tuple[str, str]) -> str | TokenPrompt | None:
    if text is not None and ids is not None:
        raise errors.InvalidRequest(names[0], f"`{names[0]}` and `{names[1]}` must not both be given")
    return text if ids is None else TokenPrompt(tuple(ids))


def _render(found: Detection) -> dict[str, Any]:
    return {
        "model": found.model,
        "gamma": found.gamma,
        "alpha": found.alpha,
        "tokens_scored": found.num_scored,
        "is_watermarked": found.is_found,
        "reason": found.reason,
        "keys": [
            {
                "is_watermarked": score.is_found,
                "green_tokens": score.num_green,
                "green_fraction": score.green_fraction,
                "z_score": score.z_score,
                "p_value": score.p_value,
                "corrected_p_value": score.corrected_p_value,
                "green": score.green,
            }
            for score in found.keys
        ],
        "tokens": [{"id": token.id, "text": token.text, "is_scored": token.is_scored} for token in found.tokens],
    }


def _render_error(error: Exception) -> tuple[int, dict[str, str], dict[str, str]]:
    """As TGI's dialect, save that members have the names they have here."""
    if isinstance(error, errors.InvalidRequest):
        return 422, {"error": f"Input validation error: {error}", "error_type": "validation"}, {}
    return render_error(error)
