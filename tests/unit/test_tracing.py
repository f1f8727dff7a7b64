from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from gyrfalcon.errors import SettingsError
from gyrfalcon.telemetry import RequestRecord
from gyrfalcon.testing.otlp import collecting
from gyrfalcon.tracing import Tracer, start_tracer, trace_headers, trace_id_of

TRACE_ID, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{CALLER}-01"

RECORD = RequestRecord(
    request_id="r-1",
    outcome="success",
    requested_model="dummy",
    model="tiny",
    is_chat=False,
    num_choices=2,
    num_prompt_tokens=5,
    max_new_tokens=20,
    num_generated_tokens=10,
    finish_reason="length",
    validation_s=0.1,
    queue_s=0.2,
    first_token_s=0.4,
    total_s=1.3,
    trace_headers=(("traceparent", TRACEPARENT),),
)


class Spans:
    """A tracer whose spans are kept here."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = Tracer(provider)

    def of(self, record: RequestRecord) -> dict[str, ReadableSpan]:
        self.tracer.trace(record)
        found = {span.name: span for span in self._exporter.get_finished_spans()}
        self._exporter.clear()
        return found


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


class TestSpans:
    def test_a_request_has_a_span_and_each_phase_one_below_it(self) -> None:
        spans = Spans().of(RECORD)
        root = spans.pop("text_completion tiny")
        assert {name: round(seconds(span), 6) for name, span in spans.items()} == {
            "validation": 0.1,
            "queue": 0.2,
            "prefill": 0.1,
            "decode": 0.9,
        }
        assert seconds(root) == pytest.approx(1.3)
        assert all(span.parent and span.parent.span_id == root.context.span_id for span in spans.values())
        assert root.start_time == spans["validation"].start_time
        assert root.end_time == spans["decode"].end_time

    def test_the_callers_span_is_the_parent(self) -> None:
        spans = Spans()
        root = spans.of(RECORD)["text_completion tiny"]
        assert f"{root.context.trace_id:032x}" == TRACE_ID
        assert root.parent is not None
        assert f"{root.parent.span_id:016x}" == CALLER
        assert spans.tracer.trace(RECORD) == TRACE_ID

    @pytest.mark.parametrize("headers", [(), (("traceparent", "nonsense"),), (("traceparent", "00-" + "0" * 52),)])
    def test_without_a_caller_a_trace_begins(self, headers: tuple[tuple[str, str], ...]) -> None:
        spans = Spans()
        root = spans.of(replace(RECORD, trace_headers=headers))["text_completion tiny"]
        assert root.parent is None
        ids = {spans.tracer.trace(replace(RECORD, trace_headers=headers)) for _ in range(3)}
        assert len(ids) == 3

    def test_a_caller_that_is_not_sampled_is_obeyed(self) -> None:
        spans = Spans()
        headers = (("traceparent", TRACEPARENT[:-1] + "0"),)
        assert spans.of(replace(RECORD, trace_headers=headers)) == {}
        assert spans.tracer.trace(replace(RECORD, trace_headers=headers)) == TRACE_ID

    def test_attributes_have_the_conventions_names(self) -> None:
        attributes = Spans().of(RECORD)["text_completion tiny"].attributes
        assert dict(attributes or {}) == {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "gyrfalcon",
            "gen_ai.request.model": "dummy",
            "gen_ai.response.model": "tiny",
            "gen_ai.response.id": "r-1",
            "gen_ai.request.choice.count": 2,
            "gen_ai.request.max_tokens": 20,
            "gen_ai.usage.input_tokens": 5,
            "gen_ai.usage.output_tokens": 10,
            "gen_ai.response.finish_reasons": ("length",),
            "gyrfalcon.time_to_first_token_s": 0.4,
        }
        assert "chat tiny" in Spans().of(replace(RECORD, is_chat=True))

    @pytest.mark.parametrize(
        ("reached", "phases"),
        [
            ({"validation_s": None, "queue_s": None, "first_token_s": None}, {"validation": 1.3}),
            ({"queue_s": None, "first_token_s": None}, {"validation": 0.1, "queue": 1.2}),
            ({"first_token_s": None}, {"validation": 0.1, "queue": 0.2, "prefill": 1.0}),
        ],
    )
    def test_a_failure_ends_the_phase_it_came_in(self, reached: dict[str, None], phases: dict[str, float]) -> None:
        spans = Spans().of(replace(RECORD, outcome="dropped", finish_reason=None, **reached))
        root = spans.pop("text_completion tiny")
        assert {name: round(seconds(span), 6) for name, span in spans.items()} == phases
        assert root.status.status_code is StatusCode.ERROR
        assert (root.attributes or {})["error.type"] == "dropped"


class TestExport:
    @pytest.mark.parametrize("path", ["", "/", "/v1/traces"])
    def test_spans_reach_a_collector(self, path: str) -> None:
        with collecting() as (url, received):
            tracer = start_tracer(url + path, "house")
            tracer.trace(RECORD)
            tracer.close()
        ((where, request),) = received
        assert where == "/v1/traces"
        (group,) = request.resource_spans
        resource = {each.key: each.value.string_value for each in group.resource.attributes}
        assert resource["service.name"] == "house"
        spans = {span.name: span for scope in group.scope_spans for span in scope.spans}
        assert set(spans) == {"text_completion tiny", "validation", "queue", "prefill", "decode"}
        assert {span.trace_id.hex() for span in spans.values()} == {TRACE_ID}

    def test_nothing_waits_for_a_collector_that_is_not_there(self) -> None:
        tracer = start_tracer("127.0.0.1:9", "house")
        tracer.trace(RECORD)
        tracer.close()

    @pytest.mark.parametrize("endpoint", ["ftp://a", "http://", "grpc://a:4317"])
    def test_an_endpoint_of_another_kind_is_refused(self, endpoint: str) -> None:
        with pytest.raises(SettingsError, match="--otlp-endpoint.*4318"):
            start_tracer(endpoint, "house")

    def test_without_the_packages_one_line_says_how_to_install_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
        with pytest.raises(SettingsError, match=r"^--otlp-endpoint: .*pip install 'gyrfalcon\[otel\]'$"):
            start_tracer("http://localhost:4318", "house")


class TestHeaders:
    def test_a_trace_is_known_by_its_header(self) -> None:
        assert trace_id_of((("traceparent", TRACEPARENT),)) == TRACE_ID
        assert trace_id_of(()) is None
        assert trace_id_of((("traceparent", "00-" + "0" * 32 + "-00f067aa0ba902b7-01"),)) is None
        assert trace_id_of((("traceparent", "x\ny"),)) is None

    def test_only_the_trace_context_is_taken(self) -> None:
        headers = {"tracestate": "a=b", "traceparent": TRACEPARENT, "authorization": "Bearer k"}
        assert trace_headers(headers) == (("traceparent", TRACEPARENT), ("tracestate", "a=b"))


def test_what_exports_is_not_loaded_unless_asked_for() -> None:
    code = """
import sys
import gyrfalcon.launch.serving
print([name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"
