"""`gyrfalcon download`: fetch a checkpoint ahead of serving it, as the init step of a pod or of an image's build."""

from __future__ import annotations

import logging
import time

from gyrfalcon.cli.planning import show_bytes
from gyrfalcon.config import LOGS, MODEL, OPTIONS, Settings
from gyrfalcon.download import ProgressLines, fetch

logger = logging.getLogger(__name__)

_NAMES = ("model", "revision", "huggingface_hub_cache", "offline")
DOWNLOAD_OPTIONS = tuple(
    option
    for option in OPTIONS
    if (option.group == MODEL and option.name in _NAMES)
    or (option.group == LOGS and option.name in ("json_output", "log_level"))
)


def download(settings: Settings) -> None:
    """Fetch MODEL into the Hub's cache and compare every file with its checksum, with a line every few seconds.

    What the cache already holds is not fetched again, but compared. A file that was damaged is removed, and the
    command fails. The Hub library's own variables apply (HF_TOKEN, HF_HOME, ...).
    """
    from gyrfalcon.telemetry import setup_logging

    setup_logging(settings.json_output, settings.log_level)
    for name in ("httpx", "httpx2"):  # the Hub library's own: a line for each request
        logging.getLogger(name).setLevel(logging.WARNING)
    began_s = time.monotonic()
    fetched = fetch(
        settings.model,
        revision=settings.revision,
        cache_dir=settings.huggingface_hub_cache,
        offline=settings.offline,
        on_fetched=ProgressLines(lambda done, rate: _say("fetching", done, rate)),
        on_checked=ProgressLines(lambda done, rate: _say("comparing checksums", done, rate)),
    )
    folder = fetched.checkpoint.folder
    if not fetched.num_files:
        print(f"{settings.model} is the folder {folder}: there is nothing to fetch")
        return
    print(
        f"{settings.model} is complete: {fetched.num_files} files, {show_bytes(fetched.num_bytes)}, checksums as "
        f"expected, {time.monotonic() - began_s:.0f} s, in {folder}"
    )


def _say(what: str, num_bytes: int, rate: float) -> None:
    logger.info("%s: %s, %s/s", what, show_bytes(num_bytes), show_bytes(round(rate)))
