from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gyrfalcon.metrics import BATCH_SIZE_BUCKETS, DURATION_BUCKETS, FAILURES, Metrics
from gyrfalcon.telemetry import RequestRecord

RECORD = RequestRecord(
    request_id="r-1",
    outcome="success",
    requested_model=None,
    model="tiny",
    is_chat=False,
    num_choices=1,
    num_prompt_tokens=5,
    max_new_tokens=20,
    num_generated_tokens=10,
    finish_reason="length",
    validation_s=0.1,
    queue_s=0.2,
    first_token_s=0.4,
    total_s=1.3,
)


@dataclass(frozen=True)
class Step:
    num_prefill_tokens: int = 0
    num_decode_rows: int = 3
    num_admitted: int = 0
    num_ahead: int = 0
    has_succeeded: bool = True
    num_accepted_tokens: tuple[int, ...] = ()
    schedule_s: float = 0.01
    forward_s: float = 0.5
    sample_s: float = 0.04
    commit_s: float = 0.02


@pytest.fixture
def metrics() -> Metrics:
    made = Metrics()
    made.limits_known(max_input_tokens=100, max_total_tokens=200, cache_tokens=4096)
    return made


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


class TestRequests:
    def test_a_success_is_measured_in_every_histogram(self, metrics: Metrics) -> None:
        metrics.request_begins()
        metrics.prompt_admitted(5, 20)
        metrics.request_ends(RECORD)
        for name, total in {
            "tgi_request_duration": 1.3,
            "tgi_request_validation_duration": 0.1,
            "tgi_request_queue_duration": 0.2,
            "tgi_request_inference_duration": 1.0,
            "tgi_request_mean_time_per_token_duration": 0.1,
            "tgi_request_generated_tokens": 10,
            "tgi_request_input_length": 5,
            "tgi_request_max_new_tokens": 20,
        }.items():
            assert sample(metrics, f"{name}_sum") == pytest.approx(total), name
            assert sample(metrics, f"{name}_count") == 1, name

    @pytest.mark.parametrize("outcome", FAILURES)
    def test_a_failure_is_counted_by_kind_and_not_measured(self, metrics: Metrics, outcome: str) -> None:
        metrics.request_ends(replace(RECORD, outcome=outcome, validation_s=None, queue_s=None))
        counts = {kind: sample(metrics, "tgi_request_failure_total", err=kind) for kind in FAILURES}
        assert counts == {kind: float(kind == outcome) for kind in FAILURES}
        assert sample(metrics, "tgi_request_success_total") == 0
        assert sample(metrics, "tgi_request_duration_count") == 0

    @pytest.mark.parametrize(("outcome", "count"), [("validation", 1), ("overloaded", 1), ("template", 1)])
    def test_what_is_refused_before_any_work_counts_as_rejected(
        self, metrics: Metrics, outcome: str, count: int
    ) -> None:
        metrics.request_ends(replace(RECORD, outcome=outcome))
        metrics.request_ends(replace(RECORD, outcome="generation"))
        assert sample(metrics, "gyrfalcon_rejected_total", cause=outcome) == count

    def test_new_tokens_are_observed_up_to_one_slice(self, metrics: Metrics) -> None:
        metrics.prompt_admitted(5, 100_000)
        assert sample(metrics, "tgi_request_max_new_tokens_sum") == 1024

    def test_gaps_between_tokens_are_counted_in_cumulative_buckets(self, metrics: Metrics) -> None:
        for gap in (0.001, 0.0011, 0.04, 99.0):
            metrics.token_gap(gap)
        name = "gyrfalcon_inter_token_seconds"
        found = [sample(metrics, f"{name}_bucket", le=bound) for bound in ("0.001", "0.002", "0.05", "10.0", "+Inf")]
        assert found == [1, 2, 3, 3, 4]
        assert sample(metrics, f"{name}_count") == 4
        assert sample(metrics, f"{name}_sum") == pytest.approx(99.0421)


class TestSteps:
    @pytest.mark.parametrize(
        ("step", "method", "other"),
        [(Step(), "decode", "prefill"), (Step(num_prefill_tokens=7), "prefill", "decode")],
    )
    def test_a_step_is_measured_in_its_parts(self, metrics: Metrics, step: Step, method: str, other: str) -> None:
        metrics.step_ended(step)
        for name, seconds in {"inference": 0.57, "forward": 0.5, "decode": 0.04, "filter": 0.02}.items():
            assert sample(metrics, f"tgi_batch_{name}_duration_sum", method=method) == pytest.approx(seconds)
            assert sample(metrics, f"tgi_batch_{name}_duration_count", method=other) == 0
        for name, count in {"count": 1, "success": 1, "failure": 0}.items():
            assert sample(metrics, f"tgi_batch_inference_{name}_total", method=method) == count
        assert sample(metrics, "gyrfalcon_step_seconds_sum") == pytest.approx(0.57)

    def test_steps_that_ran_at_once_count_one_by_one(self, metrics: Metrics) -> None:
        metrics.step_ended(Step(num_ahead=3))
        assert sample(metrics, "tgi_batch_inference_count_total", method="decode") == 4
        assert sample(metrics, "tgi_batch_inference_success_total", method="decode") == 4
        assert sample(metrics, "tgi_batch_forward_duration_count", method="decode") == 4
        assert sample(metrics, "tgi_batch_forward_duration_sum", method="decode") == pytest.approx(0.5)
        assert sample(metrics, "gyrfalcon_step_seconds_bucket", le=str(DURATION_BUCKETS[17])) == 4
        assert DURATION_BUCKETS[16] < 0.57 / 4 < DURATION_BUCKETS[17]
        assert sample(metrics, "tgi_request_skipped_tokens_bucket", le="0.0") == 4 * Step().num_decode_rows

    def test_what_speculation_gave_is_observed_for_every_sequence_of_a_step(self, metrics: Metrics) -> None:
        metrics.step_ended(Step())
        metrics.step_ended(Step(num_accepted_tokens=(0, 4)))
        metrics.step_ended(Step(num_accepted_tokens=(), has_succeeded=False))
        name = "tgi_request_skipped_tokens"
        assert [sample(metrics, f"{name}_bucket", le=bound) for bound in ("0.0", "3.0", "4.0", "+Inf")] == [5, 5, 6, 6]
        assert sample(metrics, f"{name}_sum") == 4

    def test_a_failed_step_is_counted_and_not_measured(self, metrics: Metrics) -> None:
        metrics.step_ended(Step(has_succeeded=False))
        counts = [
            sample(metrics, f"tgi_batch_inference_{name}_total", method="decode")
            for name in ("count", "success", "failure")
        ]
        assert counts == [1, 0, 1]
        assert sample(metrics, "tgi_batch_inference_duration_count", method="decode") == 0

    def test_requests_that_join_others_are_a_concatenation(self, metrics: Metrics) -> None:
        metrics.step_ended(Step(num_admitted=2, num_prefill_tokens=9, num_decode_rows=0))
        assert sample(metrics, "tgi_batch_next_size_sum") == 2
        assert sample(metrics, "tgi_batch_concat_total", reason="chunking") == 0
        metrics.step_ended(Step(num_admitted=1, num_prefill_tokens=9))
        assert sample(metrics, "tgi_batch_concat_total", reason="chunking") == 1
        assert sample(metrics, "tgi_batch_concat_duration_sum", method="decode") == pytest.approx(0.01)


class TestText:
    def test_buckets_are_those_that_dashboards_expect(self, metrics: Metrics) -> None:
        text = metrics.render().decode()
        assert (DURATION_BUCKETS[0], round(DURATION_BUCKETS[-1], 1)) == (pytest.approx(0.00015), 145.6)
        assert text.count("tgi_request_duration_bucket{") == len(DURATION_BUCKETS) + 1 == 36
        assert text.count("tgi_request_input_length_bucket{") == 101
        assert 'tgi_request_input_length_bucket{le="100.0"}' in text
        assert 'tgi_request_generated_tokens_bucket{le="200.0"}' in text
        assert text.count("tgi_batch_next_size_bucket{") == len(BATCH_SIZE_BUCKETS) + 1 == 1025

    def test_counters_of_tgi_have_no_suffix_and_ours_have(self, metrics: Metrics) -> None:
        lines = metrics.render().decode().splitlines()
        assert "tgi_request_count 0.0" in lines
        assert "# TYPE tgi_request_count counter" in lines
        assert 'tgi_batch_concat{reason="chunking"} 0.0' in lines
        assert "tgi_batch_max_total_tokens 4096.0" in lines
        assert 'gyrfalcon_aborts_total{cause="disconnect"} 0.0' in lines
        assert not any("_created" in line for line in lines)

    def test_prometheus_can_read_it(self, metrics: Metrics) -> None:
        families = list(text_string_to_metric_families(metrics.render().decode()))
        assert len({family.name for family in families}) == len(families) > 25


async def test_a_blocked_event_loop_is_seen(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gyrfalcon.metrics.LAG_INTERVAL_S", 0.001)
    watching = asyncio.create_task(metrics.watch_event_loop())
    await asyncio.sleep(0)
    time.sleep(0.03)  # noqa: ASYNC251  (what is being measured)
    await asyncio.sleep(0.001)
    watching.cancel()
    assert (sample(metrics, "gyrfalcon_event_loop_lag_seconds_sum") or 0) > 0.02
    assert (sample(metrics, "gyrfalcon_event_loop_lag_seconds_bucket", le="0.01") or 0) < (
        sample(metrics, "gyrfalcon_event_loop_lag_seconds_count") or 0
    )
