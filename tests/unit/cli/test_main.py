"""The command as a whole: version, help, light start, errors in one line."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from gyrfalcon import __version__
from gyrfalcon.config import OPTIONS

HEAVY = ("torch", "transformers", "tokenizers", "huggingface_hub", "fastapi", "uvicorn", "structlog", "numpy")


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "COLUMNS": "200", "TERM": "dumb", **variables}
    command = [sys.executable, "-m", "gyrfalcon", *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"gyrfalcon {__version__}\n")


def test_help_of_serve_shows_every_flag_and_variable() -> None:
    text = run("serve", "--help").stdout
    for option in OPTIONS:
        for name in (*option.flags, *option.variables[1:]):
            assert name in text


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["serve", "--help"], ["launcher", "--help"], ["generate", "--help"], ["models"], ["models", "--json"]],
)
def test_help_and_catalogue_load_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from gyrfalcon.cli.main import main\n"
        f"sys.argv = ['gyrfalcon', *{arguments!r}]\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code\n"
        f"print('loaded:', *sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "loaded:")


def test_the_main_module_alone_brings_no_command_line() -> None:
    """Every child process imports it once more."""
    program = "import sys, gyrfalcon.__main__; sys.exit('typer' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--port", "0"], "error: --port: `0` (flag) is not a whole number from 1 to 65535\n"),
        (["serve", "--max-total-tokens", "5", "--max-input-tokens", "5"], "error: --max-input-tokens: 5 must be below"),
        (["generate", "x", "--config", "/missing.toml"], "error: --config: `/missing.toml` cannot be read"),
        (["serve", "--trust-remote-code"], "error: --trust-remote-code: refused"),
    ],
)
def test_a_deliberate_error_is_one_line_and_exit_code_one(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["serve", "--sharded", "true"], ["generate"], ["fly"], ["serve", "a", "b"]])
def test_wrong_usage_is_exit_code_two_without_a_traceback(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "Error" in done.stderr


def test_an_unknown_flag_is_named() -> None:
    assert "No such option: --sharded" in run("serve", "--sharded", "true").stderr


def test_the_traceback_is_shown_on_demand() -> None:
    done = run("serve", "--port", "0", GYRFALCON_DEBUG="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "SettingsError: --port" in done.stderr
