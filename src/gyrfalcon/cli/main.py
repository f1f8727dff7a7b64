"""The `gyrfalcon` command: what it is called with, and how it fails."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from gyrfalcon.cli.bench import BENCH_OPTIONS, bench
from gyrfalcon.cli.doctor import doctor
from gyrfalcon.cli.download import DOWNLOAD_OPTIONS, download
from gyrfalcon.cli.fit import fit
from gyrfalcon.cli.flags import command_with_settings, print_version
from gyrfalcon.cli.generate import GENERATE_OPTIONS, generate
from gyrfalcon.cli.k8s import k8s
from gyrfalcon.cli.kaito import KaitoCommand, kaito_command
from gyrfalcon.cli.launcher import launcher_command
from gyrfalcon.cli.models import models
from gyrfalcon.cli.serve import serve
from gyrfalcon.cli.watermark import DETECT_OPTIONS, detect, with_own_exit_codes
from gyrfalcon.cli.watermark_calibration import CALIBRATE_OPTIONS, watermark_calibrate
from gyrfalcon.config import DEBUG_VARIABLE, OPTIONS
from gyrfalcon.errors import GyrfalconError

app = typer.Typer(
    name="gyrfalcon",
    help="Serve open language models over HTTP.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    # Errors of our own are one line (see `main`); any other is a bug, and its plain traceback is what helps.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
app.command()(command_with_settings(serve, OPTIONS, positional=True))
app.command()(launcher_command())
app.command(cls=KaitoCommand)(kaito_command())
app.command()(command_with_settings(generate, GENERATE_OPTIONS))
app.command()(with_own_exit_codes(command_with_settings(detect, DETECT_OPTIONS)))
app.command()(command_with_settings(watermark_calibrate, CALIBRATE_OPTIONS))
app.command()(models)
app.command()(fit)
app.command()(command_with_settings(download, DOWNLOAD_OPTIONS, positional=True))
app.command()(k8s)
app.command()(command_with_settings(bench, BENCH_OPTIONS))
app.command()(command_with_settings(doctor, OPTIONS, positional=True))


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    """Serve open language models over HTTP."""


def main() -> None:
    """Run the command line. Exit code 1 for an error we raise on purpose, 2 for wrong usage.

    A deliberate error is one line on stderr; with GYRFALCON_DEBUG=1 its traceback is shown too.
    """
    try:
        app()
    except GyrfalconError as error:
        if os.environ.get(DEBUG_VARIABLE) == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
