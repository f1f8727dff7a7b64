"""Write the tables of the pages on `launcher` and `kaito` from the commands' own: python tools/launcher_page.py

The prose around the tables is written by hand; what stands between the marks is not.
"""

from __future__ import annotations

from pathlib import Path

from gyrfalcon.cli.foreign_options import Fate, ForeignOption
from gyrfalcon.cli.kaito_options import KAITO_OPTIONS
from gyrfalcon.cli.launcher_options import LAUNCHER_OPTIONS

DOCS = Path(__file__).resolve().parent.parent / "docs"
LAUNCHER_PAGE = DOCS / "tgi-launcher.md"
KAITO_PAGE = DOCS / "kaito-service.md"
BEGIN = "<!-- tables: begin (python tools/launcher_page.py) -->"
END = "<!-- tables: end -->"


def launcher_tables() -> str:
    """One table for each fate of a flag, and one for the variables that have no flag."""
    flags = [row for row in LAUNCHER_OPTIONS if row.option.flags]
    variables = [row for row in LAUNCHER_OPTIONS if not row.option.flags]
    honoured = [row for row in flags if row.fate is Fate.HONOURED]
    without = [row for row in flags if row.fate is Fate.NO_EFFECT]
    refused = [row for row in flags if row.fate is Fate.REFUSED]
    return "\n\n".join(
        [
            "## Honoured",
            _table(
                ("Flag", "Variable", "Default", "As `serve`'s", "Meaning"),
                [(_flags(row), _variables(row), _default(row), _serve_flag(row), row.reason) for row in honoured],
            ),
            "## Without effect\n\nAccepted; a line at start says why, unless the value is one of those without a line.",
            _table(
                ("Flag", "Variable", "No line for", "Why it has no effect"),
                [(_flags(row), _variables(row), _quiet(row), row.reason) for row in without],
            ),
            "## Refused\n\nThe server does not start, unless the value asks for nothing.",
            _table(
                ("Flag", "Variable", "Accepted", "Why it is refused", "What to do"),
                [(_flags(row), _variables(row), _quiet(row), row.reason, row.remedy) for row in refused],
            ),
            "## Variables that have no flag",
            _table(
                ("Variable", "Class", "No line for", "Meaning, or why it has no effect"),
                [(f"`{row.option.label}`", _class(row), _quiet(row), row.reason) for row in variables],
            ),
        ]
    )


def kaito_tables() -> str:
    """One table for each fate of an option, and one for the variables."""
    flags = [row for row in KAITO_OPTIONS if row.option.flags]
    honoured = [row for row in flags if row.fate is Fate.HONOURED]
    without = [row for row in flags if row.fate is Fate.NO_EFFECT]
    refused = [row for row in flags if row.fate is Fate.REFUSED]
    return "\n\n".join(
        [
            "## Honoured",
            _table(
                ("Option", "Values", "Default", "As `serve`'s", "Meaning"),
                [(_flags(row), _values(row), _default(row), _serve_flag(row), row.reason) for row in honoured],
            ),
            "## Without effect\n\nAccepted; a line at start says why, unless the value is one of those without a line.",
            _table(
                ("Option", "No line for", "Why it has no effect"),
                [(_flags(row), _quiet(row), row.reason) for row in without],
            ),
            "## Refused\n\nThe server does not start, unless the value asks for nothing.",
            _table(
                ("Option", "Accepted", "Why it is refused", "What to do"),
                [(_flags(row), _quiet(row), row.reason, row.remedy) for row in refused],
            ),
            "## Variables",
            _table(
                ("Variable", "Class", "As `serve`'s", "Meaning"),
                [
                    (f"`{row.option.label}`", _class(row), _serve_flag(row), row.reason)
                    for row in KAITO_OPTIONS
                    if not row.option.flags
                ],
            ),
        ]
    )


PAGES = {LAUNCHER_PAGE: launcher_tables, KAITO_PAGE: kaito_tables}


def with_tables(path: Path) -> str:
    """The page with its tables written anew."""
    page = path.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"{path} lacks the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{PAGES[path]()}\n\n{END}{after}"


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [headings, tuple("---" for _ in headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _flags(row: ForeignOption) -> str:
    return ", ".join(f"`{flag}`" for flag in row.option.flags)


def _variables(row: ForeignOption) -> str:
    return ", ".join(f"`{name}`" for name in reversed(row.option.variables)) or "none"


def _default(row: ForeignOption) -> str:
    return "" if row.option.default in (None, ()) or row.option.secret else f"`{_spell(row.option.default)}`"


def _serve_flag(row: ForeignOption) -> str:
    return "" if row.field is None else f"`--{row.field.replace('_', '-')}`"


def _quiet(row: ForeignOption) -> str:
    return ", ".join(f"`{_spell(value)}`" for value in row.quiet if value is not None)


def _values(row: ForeignOption) -> str:
    return "`true`, `false`" if row.option.kind.is_switch else row.option.kind.allowed


def _class(row: ForeignOption) -> str:
    return "honoured" if row.fate is Fate.HONOURED else "without effect"


def _spell(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(_spell(item) for item in value)
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    for each in PAGES:
        each.write_text(with_tables(each), encoding="utf-8")
