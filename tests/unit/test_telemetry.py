from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest

from gyrfalcon.telemetry import Metrics, RequestRecord, setup_logging

RECORD = RequestRecord(
    request_id="r-1",
    outcome="success",
    model="tiny",
    num_prompt_tokens=5,
    max_new_tokens=20,
    num_generated_tokens=10,
    finish_reason="length",
    validation_s=0.1,
    queue_s=0.2,
    total_s=1.3,
)


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(max_input_tokens=100, max_total_tokens=200)


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


class TestMetrics:
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

    def test_a_failure_is_counted_by_kind_and_not_measured(self, metrics: Metrics) -> None:
        metrics.request_ends(replace(RECORD, outcome="overloaded", validation_s=None, queue_s=None))
        assert sample(metrics, "tgi_request_failure_total", err="overloaded") == 1
        assert sample(metrics, "tgi_request_success_total") == 0
        assert sample(metrics, "tgi_request_duration_count") == 0

    def test_new_tokens_are_observed_up_to_one_slice(self, metrics: Metrics) -> None:
        metrics.prompt_admitted(5, 100_000)
        assert sample(metrics, "tgi_request_max_new_tokens_sum") == 1024

    def test_buckets_are_those_that_dashboards_expect(self, metrics: Metrics) -> None:
        text = metrics.render().decode()
        assert text.count("tgi_request_duration_bucket{") == 36
        assert text.count("tgi_request_input_length_bucket{") == 101
        assert 'tgi_request_input_length_bucket{le="100.0"}' in text
        assert 'tgi_request_generated_tokens_bucket{le="200.0"}' in text


class TestLogging:
    def lines(self, capsys: pytest.CaptureFixture[str]) -> list[str]:
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err.splitlines()

    def test_a_finished_request_is_one_line_of_json(self, capsys: pytest.CaptureFixture[str], metrics: Metrics) -> None:
        setup_logging(json_output=True)
        metrics.request_ends(RECORD)
        (line,) = self.lines(capsys)
        fields = json.loads(line)
        assert fields["event"] == "request finished"
        assert (fields["request_id"], fields["outcome"], fields["finish_reason"]) == ("r-1", "success", "length")
        assert (fields["prompt_tokens"], fields["generated_tokens"]) == (5, 10)
        assert fields["inference_s"] == pytest.approx(1.0)

    def test_or_one_line_for_a_person(self, capsys: pytest.CaptureFixture[str], metrics: Metrics) -> None:
        setup_logging(json_output=False)
        metrics.request_ends(RECORD)
        (line,) = self.lines(capsys)
        assert "request finished" in line
        assert "generated_tokens=10" in line

    def test_the_level_is_obeyed(self, capsys: pytest.CaptureFixture[str]) -> None:
        setup_logging(json_output=True, level="warning")
        logging.getLogger("x").info("quiet")
        logging.getLogger("x").warning("loud")
        (line,) = self.lines(capsys)
        assert json.loads(line)["event"] == "loud"

    def test_set_up_twice_a_line_is_written_once(self, capsys: pytest.CaptureFixture[str]) -> None:
        setup_logging(json_output=True)
        setup_logging(json_output=True)
        logging.getLogger("x").info("once")
        assert len(self.lines(capsys)) == 1

    @pytest.mark.parametrize("json_output", [True, False])
    def test_a_clients_text_cannot_write_lines_of_its_own(
        self, capsys: pytest.CaptureFixture[str], json_output: bool
    ) -> None:
        setup_logging(json_output)
        logging.getLogger("x").info("seen", extra={"agent": "a\nforged\x1b[31m line"})
        (line,) = self.lines(capsys)
        assert "\x1b[31m" not in line

    def test_a_servers_own_lines_take_the_same_road(self, capsys: pytest.CaptureFixture[str]) -> None:
        setup_logging(json_output=True)
        logging.getLogger("uvicorn.error").info("Started %s", "well", extra={"color_message": "coloured"})
        (line,) = self.lines(capsys)
        assert json.loads(line)["event"] == "Started well"
        assert "coloured" not in line

    def test_an_exception_is_shown_with_its_traceback(self, capsys: pytest.CaptureFixture[str]) -> None:
        setup_logging(json_output=True)
        logging.getLogger("x").error("failed", exc_info=KeyError("why"))
        (line,) = self.lines(capsys)
        assert "KeyError" in json.loads(line)["exception"]
