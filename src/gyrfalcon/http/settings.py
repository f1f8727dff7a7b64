"""What the HTTP side takes from the settings."""

from __future__ import annotations

from dataclasses import dataclass

from gyrfalcon.http.wire import BodyLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSettings:
    """api_keys: any of them is accepted; none leaves every route open, unless keys come from elsewhere. open_metrics:
    whether /metrics is answered without a key too. cors_allow_origins: empty allows any origin.
    compute_type: what answers say they were computed on, None for the model's device. predict_path, health_path: where
    Vertex AI sends its requests besides /vertex and /health. kaito_pipeline: what /chat continues: a prompt
    ("text-generation") or messages ("conversational").
    """

    api_keys: tuple[str, ...] = ()
    open_metrics: bool = False
    cors_allow_origins: tuple[str, ...] = ()
    payload_limit: int = 2_000_000  # bytes of a request's body
    body_timeout_s: float = 30.0
    max_json_depth: int = 64
    max_json_digits: int = 100
    max_prompts: int = 32  # of one request
    max_header_bytes: int = 32 * 1024  # names and values together
    max_header_fields: int = 100
    ping_s: float = 10.0  # silence on a stream after which a comment is sent
    stall_s: float = 60.0  # time after which a client that reads nothing is given up
    compute_type: str | None = None
    predict_path: str | None = None
    health_path: str | None = None
    kaito_pipeline: str = "text-generation"

    @property
    def body_limits(self) -> BodyLimits:
        return BodyLimits(
            max_bytes=self.payload_limit,
            max_depth=self.max_json_depth,
            max_digits=self.max_json_digits,
            timeout_s=self.body_timeout_s,
        )
