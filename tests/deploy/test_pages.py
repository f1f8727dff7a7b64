"""The pages on deploying: tables are made from the catalogue, links lead somewhere, commands do what is said."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gyrfalcon.cli.main import app
from tools.models_page import PAGES, with_tables

ROOT = Path(__file__).parents[2]
TEXTS = {
    name: (ROOT / "docs" / name).read_text()
    for name in ("kubernetes.md", "from-kaito.md", "models.md", "images.md", "fit.md")
}


@pytest.mark.parametrize("name", PAGES)
def test_tables_are_what_the_tool_makes_now(name: str) -> None:
    assert with_tables(TEXTS[name]) == TEXTS[name], "run: python tools/models_page.py"


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_links_lead_to_files_that_exist(name: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", TEXTS[name])
    missing = [link for link in links if not (ROOT / "docs" / link).exists()]
    assert missing == []


def commands() -> list[str]:
    """Every `gyrfalcon fit` and `gyrfalcon k8s` that stands in a block of a page."""
    found = []
    for text in TEXTS.values():
        for block in re.findall(r"```[a-z]*\n(.*?)```", text, re.DOTALL):
            for line in block.splitlines():
                match = re.match(r"\s*gyrfalcon ((?:fit|k8s|models)\b[^#|]*)", line)
                found += [match[1].strip()] if match else []
    return found


@pytest.mark.parametrize("command", [each for each in commands() if "./" not in each])
def test_documented_commands_run(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, shlex.split(command))
    assert result.exit_code == 0, result.exception
    assert result.output


def test_there_are_documented_commands() -> None:
    assert len(commands()) >= 5
