"""Loading progress: a bar on a terminal, a line every tenth elsewhere."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from gyrfalcon.cli.progress import LoadingProgress


def test_without_a_terminal_each_tenth_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    out = io.StringIO()
    with LoadingProgress(Console(file=out)) as progress:
        for done in range(0, 1001, 7):
            progress(done, 1000)
        progress(1000, 1000)
    percents = [record.__dict__["percent"] for record in caplog.records]
    assert percents == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
    assert out.getvalue() == ""


def test_an_empty_checkpoint_does_not_divide_by_zero(caplog: pytest.LogCaptureFixture) -> None:
    with LoadingProgress(Console(file=io.StringIO())) as progress:
        progress(0, 0)


def test_on_a_terminal_a_bar_shows_the_bytes_and_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    out = io.StringIO()
    with LoadingProgress(Console(file=out, force_terminal=True, width=100)) as progress:
        progress(5_000_000, 10_000_000)
        progress(10_000_000, 10_000_000)
    assert "10.0/10.0 MB" in out.getvalue()
    assert not caplog.records


def test_on_a_terminal_nothing_is_drawn_before_the_first_report() -> None:
    out = io.StringIO()
    with LoadingProgress(Console(file=out, force_terminal=True)):
        pass
    assert out.getvalue() == ""


def test_a_bar_that_did_not_reach_the_end_is_taken_away() -> None:
    out = io.StringIO()
    with LoadingProgress(Console(file=out, force_terminal=True, width=100)) as progress:
        progress(1, 10)
    assert "loading weights" in out.getvalue()
    assert out.getvalue().endswith("\x1b[2K")  # the bar's line is erased
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h")  # the cursor is back
