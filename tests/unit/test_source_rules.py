"""7.9: rules that the sources keep, looked up in their syntax trees rather than in their letters."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "gyrfalcon"
TREES = {str(path.relative_to(SOURCE)): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCE.rglob("*.py")}

FORBIDDEN_CALLS = {"eval", "exec", "compile", "hash", "__import__", "torch.load", "os.system", "os.popen"}
FORBIDDEN_CALLS |= {"jinja2.Environment", "jinja2.Template", "Environment", "yaml.load", "tempfile.mktemp"}
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
# Where the time of day is what is asked for: the age of files, and the date that a chat template may print.
WALL_CLOCKS = {"time.time", "datetime.now", "datetime.utcnow", "datetime.datetime.now"}
ASKS_THE_TIME_OF_DAY = {"kernels/cpu/packed_file.py", "service/chat.py"}


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """(file, dotted name, call) of every call of a plain or dotted name."""
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                yield file, ast.unparse(node.func), node


@pytest.mark.parametrize("name", sorted(FORBIDDEN_CALLS))
def test_7_9_nobody_calls(name: str) -> None:
    assert [file for file, called, _ in calls() if called == name] == []


def test_7_9_nobody_imports_what_runs_code_from_data() -> None:
    found = [
        file
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        for module in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        if module.split(".")[0] in FORBIDDEN_MODULES
    ]
    assert found == []


@pytest.mark.parametrize("keyword", ["trust_remote_code", "shell", "allow_pickle"])
def test_7_9_nobody_switches_on(keyword: str) -> None:
    switched = [
        file
        for file, _, call in calls()
        for argument in call.keywords
        if argument.arg == keyword and not (isinstance(argument.value, ast.Constant) and argument.value.value is False)
    ]
    assert switched == []


def test_7_9_a_template_is_rendered_in_the_immutable_sandbox_only() -> None:
    made = {called for _, called, _ in calls() if called.endswith("Environment")}
    assert made == {"ImmutableSandboxedEnvironment"}


def test_7_9_no_assertion_guards_what_comes_from_outside() -> None:
    guarding = ("http/auth.py", "http/keys.py", "http/wire.py", "http/tgi_schema.py", "http/kaito_schema.py")
    guarding += ("service/validation.py", "hub.py", "download.py", "config.py", "models/config_file.py")
    assert [file for file in guarding if any(isinstance(node, ast.Assert) for node in ast.walk(TREES[file]))] == []


def test_6_10_only_the_monotonic_clock_measures_time() -> None:
    assert {file for file, called, _ in calls() if called in WALL_CLOCKS} <= ASKS_THE_TIME_OF_DAY
