"""What the server tells about itself: log lines and metrics. On the ground: imports nothing of ours."""

from __future__ import annotations

import itertools
import logging
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

METRICS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
DURATION_BUCKETS = tuple(0.0001 * 1.5**k for k in range(1, 36))
NUM_LENGTH_BUCKETS = 100
# Histogram value of a request that may fill the context: TGI's scheduling slice.
LARGEST_SLICE_TOKENS = 1024

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
    """How one request went; what was never reached is None."""

    request_id: str
    outcome: str  # "success", or a failure: validation, overloaded, generation, incomplete, dropped, template
    model: str | None
    num_prompt_tokens: int | None
    max_new_tokens: int | None
    num_generated_tokens: int
    finish_reason: str | None
    validation_s: float | None
    queue_s: float | None
    total_s: float

    @property
    def inference_s(self) -> float | None:
        if self.validation_s is None or self.queue_s is None:
            return None
        return max(self.total_s - self.validation_s - self.queue_s, 0.0)


class EngineReading(Protocol):
    """The gauges and running totals of an engine that metrics show."""

    @property
    def num_waiting(self) -> int: ...
    @property
    def num_running(self) -> int: ...
    @property
    def cache_usage(self) -> float: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def num_preemptions(self) -> int: ...
    @property
    def prefix_hit_tokens(self) -> int: ...
    @property
    def prefix_query_tokens(self) -> int: ...
    @property
    def prefill_tokens(self) -> int: ...
    @property
    def decode_tokens(self) -> int: ...
    @property
    def last_step_s(self) -> float: ...


class Metrics:
    """The server's metrics in a registry of their own.

    The `tgi_*` names, labels and buckets are those that dashboards for TGI query; the rest is `gyrfalcon_*`.
    """

    def __init__(self, *, max_input_tokens: int, max_total_tokens: int) -> None:
        """The token limits span the buckets of the length histograms."""
        self.registry = CollectorRegistry()
        self._count = self._counter("tgi_request_count", "Generation requests begun")
        self._success = self._counter("tgi_request_success", "Requests answered")
        self._failure = Counter(
            "tgi_request_failure", "Requests that failed, by kind of failure", ["err"], registry=self.registry
        )
        self._duration = self._durations("tgi_request_duration", "Seconds from arrival to end")
        self._validation = self._durations("tgi_request_validation_duration", "Seconds from arrival to the engine")
        self._queue = self._durations("tgi_request_queue_duration", "Seconds from the engine to the first step")
        self._inference = self._durations("tgi_request_inference_duration", "Seconds from the first step to the end")
        self._per_token = self._durations(
            "tgi_request_mean_time_per_token_duration", "Seconds of inference per generated token"
        )
        self._input = self._lengths("tgi_request_input_length", "Prompt tokens", max_input_tokens)
        self._generated = self._lengths("tgi_request_generated_tokens", "Generated tokens", max_total_tokens)
        self._max_new = self._lengths("tgi_request_max_new_tokens", "New tokens asked for", max_total_tokens)

    def watch_engines(self, read: Callable[[], Mapping[str, EngineReading]]) -> None:
        """Show what the engines' readings say, each time the metrics are asked for."""
        self.registry.register(_EngineCollector(read))

    def request_begins(self) -> None:
        self._count.inc()

    def prompt_admitted(self, num_prompt_tokens: int, max_new_tokens: int) -> None:
        """A request has passed every check."""
        self._input.observe(num_prompt_tokens)
        self._max_new.observe(min(max_new_tokens, LARGEST_SLICE_TOKENS))

    def request_ends(self, record: RequestRecord) -> None:
        """Count a request that is over, and log it in one line."""
        if record.outcome == "success":
            self._success.inc()
            self._duration.observe(record.total_s)
            self._generated.observe(record.num_generated_tokens)
            if record.validation_s is not None:
                self._validation.observe(record.validation_s)
            if record.queue_s is not None:
                self._queue.observe(record.queue_s)
            if record.inference_s is not None:
                self._inference.observe(record.inference_s)
                self._per_token.observe(record.inference_s / max(record.num_generated_tokens, 1))
        else:
            self._failure.labels(err=record.outcome).inc()
        log_request(record)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        text = generate_latest(self.registry).decode("utf-8")
        # The client library names counters `*_total` and dates every series; TGI's dashboards know neither.
        text = re.sub(r"(?m)^(# (?:HELP|TYPE) )?(tgi_\w+?)_total\b", r"\1\2", text)
        text = re.sub(r"(?m)^(# (?:HELP|TYPE) )?\w+_created\b.*\n", "", text)
        return text.encode("utf-8")

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, registry=self.registry)

    def _durations(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, buckets=DURATION_BUCKETS, registry=self.registry)

    def _lengths(self, name: str, text: str, most: int) -> Histogram:
        steps = [most * (step + 1) / NUM_LENGTH_BUCKETS for step in range(NUM_LENGTH_BUCKETS)]
        return Histogram(name, text, buckets=steps, registry=self.registry)


def log_request(record: RequestRecord) -> None:
    """One line for a finished request: sizes, times and outcome, none of its text."""
    fields = {
        "request_id": record.request_id,
        "outcome": record.outcome,
        "served_model": record.model,
        "prompt_tokens": record.num_prompt_tokens,
        "generated_tokens": record.num_generated_tokens,
        "finish_reason": record.finish_reason,
        "validation_s": record.validation_s,
        "queue_s": record.queue_s,
        "inference_s": record.inference_s,
        "total_s": record.total_s,
    }
    shown = {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in fields.items()
        if value is not None
    }
    logger.info("request finished", extra=shown)


class _EngineCollector:
    """Turns the engines' readings into samples when the registry is collected."""

    GAUGES = (
        ("gyrfalcon_requests_waiting", "Requests that hold no cache yet", "num_waiting"),
        ("gyrfalcon_sequences_running", "Sequences in the batch", "num_running"),
        ("gyrfalcon_cache_usage_ratio", "Share of the KV cache's blocks in use", "cache_usage"),
        ("gyrfalcon_last_step_seconds", "Duration of the newest step", "last_step_s"),
    )
    COUNTERS = (
        ("gyrfalcon_steps", "Steps run", "num_steps"),
        ("gyrfalcon_preemptions", "Sequences that gave their cache up for others", "num_preemptions"),
        ("gyrfalcon_prefix_hit_tokens", "Prompt tokens found in the prefix cache", "prefix_hit_tokens"),
        ("gyrfalcon_prefix_query_tokens", "Prompt tokens looked up in the prefix cache", "prefix_query_tokens"),
        ("gyrfalcon_prefill_tokens", "Prompt tokens computed", "prefill_tokens"),
        ("gyrfalcon_decode_tokens", "Tokens generated", "decode_tokens"),
    )

    def __init__(self, read: Callable[[], Mapping[str, EngineReading]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        readings = self._read()
        yield GaugeMetricFamily(
            "tgi_queue_size", "Requests waiting", value=sum(reading.num_waiting for reading in readings.values())
        )
        yield GaugeMetricFamily(
            "tgi_batch_current_size", "Sequences running", value=sum(r.num_running for r in readings.values())
        )
        for name, text, field in self.GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=["model"])
            for model, reading in readings.items():
                gauge.add_metric([model], getattr(reading, field))
            yield gauge
        for name, text, field in self.COUNTERS:
            counter = CounterMetricFamily(name, text, labels=["model"])
            for model, reading in readings.items():
                counter.add_metric([model], getattr(reading, field))
            yield counter
