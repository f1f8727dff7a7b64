"""What the server writes about itself: log lines, and how one request went. On the ground: imports nothing of ours."""

from __future__ import annotations

import itertools
import logging
import secrets
import sys
from dataclasses import dataclass

import structlog

logger = logging.getLogger(__name__)

_process_mark = secrets.token_hex(4)
_request_numbers = itertools.count(1)


def new_request_id() -> str:
    """An id that no other request of this process has, and hardly any of another."""
    return f"{_process_mark}-{next(_request_numbers)}"


def setup_logging(json_output: bool, level: str = "info") -> None:
    """Send every log line to standard error: one JSON object a line, or columns for a person to read.

    level: a name that `logging` knows, in any case. Replaces the handlers of earlier calls.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if json_output
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0)
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            _clean,
            renderer,
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # uvicorn brings handlers and levels of its own; its lines take the same road as ours.
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        theirs = logging.getLogger(name)
        theirs.handlers.clear()
        theirs.setLevel(logging.NOTSET)
        theirs.propagate = True


def _clean(
    _logger: structlog.typing.WrappedLogger, _method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """Drop repetition, and keep a client's text from writing lines of its own into the log."""
    event.pop("color_message", None)  # uvicorn repeats its lines with colours
    for key, value in event.items():
        if isinstance(value, str) and key != "exception" and not value.isprintable():
            event[key] = value.encode("unicode_escape").decode("ascii")
    return event


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """How one request went; what was never reached is None.

    trace_headers: the W3C trace context that came with it, as (name, value) pairs. Times in seconds: validation_s
    from arrival to the engine, queue_s from there to the first step, first_token_s and total_s from arrival.
    """

    request_id: str
    outcome: str  # "success", or a failure: one of `metrics.FAILURES`
    requested_model: str | None  # the name the caller sent
    model: str | None  # the name of the one that ran
    is_chat: bool
    num_choices: int | None
    num_prompt_tokens: int | None
    max_new_tokens: int | None
    num_generated_tokens: int
    finish_reason: str | None
    validation_s: float | None
    queue_s: float | None
    first_token_s: float | None
    total_s: float
    trace_headers: tuple[tuple[str, str], ...] = ()
    caller: str | None = None  # the API key's name
    prompt: str | None = None  # only where the operator wants prompts in the log

    @property
    def inference_s(self) -> float | None:
        """Seconds from the first step to the end."""
        if self.validation_s is None or self.queue_s is None:
            return None
        return max(self.total_s - self.validation_s - self.queue_s, 0.0)


def log_request(record: RequestRecord, trace_id: str | None = None) -> None:
    """One line for a finished request: sizes, times and outcome; its text only where the record has it."""
    fields = {
        "request_id": record.request_id,
        "trace_id": trace_id,
        "outcome": record.outcome,
        "served_model": record.model,
        "api_key": record.caller,
        "prompt_tokens": record.num_prompt_tokens,
        "generated_tokens": record.num_generated_tokens,
        "finish_reason": record.finish_reason,
        "validation_s": record.validation_s,
        "queue_s": record.queue_s,
        "first_token_s": record.first_token_s,
        "inference_s": record.inference_s,
        "total_s": record.total_s,
        "prompt": record.prompt,
    }
    shown = {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in fields.items()
        if value is not None
    }
    logger.info("request finished", extra=shown)
