"""Traces: a span for each request and one for each of its phases, exported over OTLP/HTTP.

Spans are made when a request has ended, from the times in its record: while it runs, tracing costs nothing. The
OpenTelemetry packages are optional and imported only here, when an endpoint is set.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from gyrfalcon import __version__
from gyrfalcon.errors import SettingsError
from gyrfalcon.telemetry import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

TRACE_HEADERS = ("traceparent", "tracestate")
SYSTEM = "gyrfalcon"
TRACES_PATH = "/v1/traces"

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")


class Tracer:
    """Makes the spans of ended requests and hands them to a provider, which exports them in its own thread."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("gyrfalcon", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def trace(self, record: RequestRecord) -> str:
        """Make a request's spans, below the caller's own where it sent its trace context; give the trace's id."""
        from opentelemetry import trace

        end_ns = time.time_ns()
        start_ns = end_ns - round(record.total_s * 1e9)
        root = self._tracer.start_span(
            f"{_operation(record)} {record.model}" if record.model else _operation(record),
            # A fresh context: only what the caller sent may be the parent.
            context=self._propagator.extract(dict(record.trace_headers), trace.set_span_in_context(trace.INVALID_SPAN)),
            kind=trace.SpanKind.SERVER,
            attributes=dict(_attributes(record)),
            start_time=start_ns,
        )
        if root.is_recording():
            inside = trace.set_span_in_context(root)
            for name, from_s, to_s in _phases(record):
                phase = self._tracer.start_span(name, context=inside, start_time=start_ns + round(from_s * 1e9))
                phase.end(start_ns + round(to_s * 1e9))
        if record.outcome != "success":
            _mark_failed(root, record.outcome)
        root.end(end_ns)
        return trace.format_trace_id(root.get_span_context().trace_id)

    def close(self) -> None:
        """Export what is left; waits for the collector, but not for long."""
        self._provider.force_flush(2000)
        self._provider.shutdown()


def start_tracer(endpoint: str, service_name: str) -> Tracer:
    """A tracer that exports to a collector in the background.

    endpoint: the collector's base URL; the path of traces is added where there is none. Raises SettingsError when the
    endpoint is no such URL or the packages are not installed.
    """
    url = _traces_url(endpoint)
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise SettingsError(
            "--otlp-endpoint", "traces need packages that are not installed: pip install 'gyrfalcon[otel]'"
        ) from None
    resource = Resource.create({"service.name": service_name, "service.version": __version__})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    # Bounded: spans beyond the queue are dropped when the collector does not keep up.
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url, timeout=5)))
    return Tracer(provider)


def trace_id_of(headers: tuple[tuple[str, str], ...]) -> str | None:
    """The id of the trace that a request belongs to by its own headers, None where they name none."""
    match = _TRACEPARENT.fullmatch(dict(headers).get("traceparent", ""))
    return match[1] if match and set(match[1]) != {"0"} else None


def trace_headers(headers: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Of a request's headers those that carry its trace context."""
    return tuple((name, headers[name]) for name in TRACE_HEADERS if name in headers)


def _traces_url(endpoint: str) -> str:
    url = endpoint if "://" in endpoint else f"http://{endpoint}"
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise SettingsError(
            "--otlp-endpoint", f"`{endpoint}` is not the URL of an OTLP/HTTP collector such as http://localhost:4318"
        )
    return url if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}{TRACES_PATH}"


def _operation(record: RequestRecord) -> str:
    return "chat" if record.is_chat else "text_completion"


def _attributes(record: RequestRecord) -> Iterator[tuple[str, str | int | float | tuple[str, ...]]]:
    """Under the names of OpenTelemetry's conventions for generative models; the last ones are our own."""
    yield "gen_ai.operation.name", _operation(record)
    yield "gen_ai.provider.name", SYSTEM
    yield "gen_ai.response.id", record.request_id
    values = {
        "gen_ai.request.model": record.requested_model or record.model,
        "gen_ai.response.model": record.model,
        "gen_ai.request.choice.count": record.num_choices,
        "gen_ai.request.max_tokens": record.max_new_tokens,
        "gen_ai.usage.input_tokens": record.num_prompt_tokens,
    }
    yield from ((name, value) for name, value in values.items() if value is not None)
    yield "gen_ai.usage.output_tokens", record.num_generated_tokens
    if record.finish_reason is not None:
        yield "gen_ai.response.finish_reasons", (record.finish_reason,)
    if record.first_token_s is not None:
        yield "gyrfalcon.time_to_first_token_s", record.first_token_s


def _phases(record: RequestRecord) -> Iterator[tuple[str, float, float]]:
    """Name, begin and end of the phases that were reached, in seconds since arrival; the last may be cut short."""
    total_s, validated_s = record.total_s, record.validation_s
    yield "validation", 0.0, total_s if validated_s is None else validated_s
    if validated_s is None:
        return
    started_s = None if record.queue_s is None else min(validated_s + record.queue_s, total_s)
    yield "queue", validated_s, total_s if started_s is None else started_s
    if started_s is None:
        return
    first_s = None if record.first_token_s is None else max(record.first_token_s, started_s)
    yield "prefill", started_s, total_s if first_s is None else first_s
    if first_s is not None:
        yield "decode", first_s, total_s


def _mark_failed(span: Span, outcome: str) -> None:
    from opentelemetry.trace import Status, StatusCode

    span.set_attribute("error.type", outcome)
    span.set_status(Status(StatusCode.ERROR, outcome))
