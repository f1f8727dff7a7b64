"""What a started server tells those who watch it: a collector of traces, Prometheus, a platform's health check."""

from __future__ import annotations

import signal

from gyrfalcon.testing.otlp import collecting
from gyrfalcon.testing.server import running_server

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


def test_a_server_is_seen_from_outside() -> None:
    with (
        collecting() as (url, received),
        running_server("--otlp-endpoint", url, "--otlp-service-name", "house", "--aip-health-route", "/live") as server,
    ):
        body = {"inputs": "Return the number of", "parameters": {"max_new_tokens": 5}}
        headers = {"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01"}
        assert server.request("POST", "/generate", body, headers=headers).status == 200
        assert server.request("GET", "/live").status == 200
        metrics = server.request("GET", "/metrics").body.decode()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=15) == 0
        assert TRACE_ID in server.log
    lines = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    assert float(lines['tgi_batch_inference_count{method="prefill"}']) == 1
    assert float(lines['tgi_batch_forward_duration_count{method="decode"}']) == 4
    assert float(lines['tgi_batch_forward_duration_sum{method="decode"}']) > 0
    assert float(lines["tgi_batch_max_total_tokens"]) > 0
    assert float(lines['gyrfalcon_peak_memory_bytes{model="eyas"}']) > 2**20
    assert "gyrfalcon_event_loop_lag_seconds_count" in lines
    (group,) = [group for _, request in received for group in request.resource_spans]
    assert "house" in {each.value.string_value for each in group.resource.attributes}
    spans = {span.name: span for scope in group.scope_spans for span in scope.spans}
    assert set(spans) == {"text_completion eyas", "validation", "queue", "prefill", "decode"}
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE_ID}
