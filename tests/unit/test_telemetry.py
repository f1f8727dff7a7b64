from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from gyrfalcon.telemetry import RequestRecord, log_request, setup_logging

RECORD = RequestRecord(
    request_id="r-1",
    outcome="success",
    requested_model="dummy",
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


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


class TestLogging:
    def lines(self, capsys: pytest.CaptureFixture[str]) -> list[str]:
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err.splitlines()

    def test_a_finished_request_is_one_line_of_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        setup_logging(json_output=True)
        log_request(RECORD, "a" * 32)
        (line,) = self.lines(capsys)
        fields = json.loads(line)
        assert fields["event"] == "request finished"
        assert (fields["request_id"], fields["outcome"], fields["finish_reason"]) == ("r-1", "success", "length")
        assert (fields["prompt_tokens"], fields["generated_tokens"]) == (5, 10)
        assert (fields["first_token_s"], fields["trace_id"]) == (0.4, "a" * 32)
        assert fields["inference_s"] == pytest.approx(1.0)

    def test_or_one_line_for_a_person(self, capsys: pytest.CaptureFixture[str]) -> None:
        setup_logging(json_output=False)
        log_request(RECORD, "a" * 32)
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
