"""What the HTTP side takes from the settings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSettings:
    """api_keys: any of them is accepted; none leaves every route open. cors_allow_origins: empty allows any origin.
    compute_type: what answers say they were computed on, None for the model's device. predict_path, health_path: where
    Vertex AI sends its requests besides /vertex and /health. kaito_pipeline: what /chat continues: a prompt
    ("text-generation") or messages ("conversational").
    """

    api_keys: tuple[str, ...] = ()
    cors_allow_origins: tuple[str, ...] = ()
    payload_limit: int = 2_000_000  # bytes of a request's body
    body_timeout_s: float = 30.0
    ping_s: float = 10.0  # silence on a stream after which a comment is sent
    stall_s: float = 60.0  # time after which a client that reads nothing is given up
    compute_type: str | None = None
    predict_path: str | None = None
    health_path: str | None = None
    kaito_pipeline: str = "text-generation"
