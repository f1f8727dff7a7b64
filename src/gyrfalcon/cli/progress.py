"""How far loading the weights is: a bar on a terminal, a log line every tenth elsewhere."""

from __future__ import annotations

import logging
import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)


class LoadingProgress:
    """Told the bytes done and in all, from any thread, as often as the loader likes; shown until it is left."""

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(file=sys.stderr)
        self._tenth = -1
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("loading weights"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("loading", total=None, visible=False)

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        if self._bar is not None:
            # Not before the first report: what comes earlier (a download) has a bar of its own.
            if not self._bar.live.is_started:
                self._bar.start()
            self._bar.update(self._task, completed=done_bytes, total=total_bytes, visible=True)
            if done_bytes >= total_bytes:
                self._bar.stop()
            return
        tenth = 10 * done_bytes // max(total_bytes, 1)
        if tenth > self._tenth:
            self._tenth = tenth
            logger.info("loading weights", extra={"percent": 10 * tenth, "total_bytes": total_bytes})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
