"""`gyrfalcon serve`: bind the address, load the model, say how to talk to it, serve."""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from typing import TYPE_CHECKING

from gyrfalcon.cli.launcher_options import unheeded_by_serve
from gyrfalcon.config import Settings

if TYPE_CHECKING:
    from gyrfalcon.service.interface import ModelInfo

logger = logging.getLogger(__name__)


def serve(settings: Settings) -> None:
    """Serve MODEL over HTTP until interrupted.

    Every option can also be set by a variable (GYRFALCON_PORT for --port; those in brackets work too) and in a TOML
    file (port = 8080). A flag wins over a variable, a variable over the file.
    """
    from gyrfalcon.telemetry import setup_logging

    setup_logging(settings.json_output, settings.log_level)
    for line in unheeded_by_serve(os.environ):
        logger.warning("%s", line)
    run_server(settings)


def run_server(settings: Settings) -> None:
    """Claim the address, serve on it until interrupted, and show the banner once the model is ready.

    Logging is set up already.
    """
    # The flags are explained without loading what serving takes.
    from gyrfalcon.cli.listener import claim
    from gyrfalcon.launch.child import child_ahead

    with claim(settings.host, settings.port) as listener, child_ahead(settings) as child:
        # Only now, while the child imports torch: web framework and tokenizers.
        from gyrfalcon.cli.progress import LoadingProgress
        from gyrfalcon.launch import serving

        with LoadingProgress() as progress:
            serving.serve(
                settings, listener=listener, child=child, on_progress=progress, on_ready=partial(_announce, settings)
            )


def _announce(settings: Settings, model: ModelInfo) -> None:
    from gyrfalcon.cli.banner import render_banner

    if settings.json_output:
        return  # a log collector wants lines; the resolved settings are in the log
    try:
        print(render_banner(settings, model), flush=True)
    except OSError as error:  # a full disk is no reason not to serve
        logger.warning("the banner cannot be shown: %s", error.strerror)
        # What is left in the buffer would fail once more at the end, and change the exit status.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
