"""`gyrfalcon serve`: bind the address, load the model, say how to talk to it, serve."""

from __future__ import annotations

from gyrfalcon.config import Settings


def serve(settings: Settings) -> None:
    """Serve MODEL over HTTP until interrupted.

    Every option can also be set by a variable (GYRFALCON_PORT for --port; those in brackets work too) and in a TOML
    file (port = 8080). A flag wins over a variable, a variable over the file.
    """
    # The flags are explained without loading what serving takes: web framework and engine.
    from gyrfalcon.cli.banner import render_banner
    from gyrfalcon.cli.listener import claim
    from gyrfalcon.cli.progress import LoadingProgress
    from gyrfalcon.launch import serving
    from gyrfalcon.service.interface import ModelInfo
    from gyrfalcon.telemetry import setup_logging

    setup_logging(settings.json_output, settings.log_level)

    def announce(model: ModelInfo) -> None:
        if not settings.json_output:  # a log collector wants lines; the resolved settings are in the log
            print(render_banner(settings, model), flush=True)

    with claim(settings.host, settings.port) as listener, LoadingProgress() as progress:
        serving.serve(settings, listener=listener, on_progress=progress, on_ready=announce)
