"""Renders a Helm chart that keeps to a small part of Go's templates: if, with, define, pipelines, a few functions.

What it does not know is an error, so that a chart cannot use more than is checked here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

_ACTION = re.compile(r"\{\{(-\s)?\s*(.*?)\s*(\s-)?\}\}", re.DOTALL)
_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|\||[^\s|]+')


@dataclass
class Node:
    """Text, an expression, or a block with two branches."""

    kind: str
    text: str
    then: list[Node] = field(default_factory=list)
    otherwise: list[Node] = field(default_factory=list)


def render_chart(folder: Path, values: dict[str, Any], release: str = "release") -> dict[str, list[Any]]:
    """The documents of every template by its file's name."""
    root = {"Values": values, "Release": {"Name": release, "Namespace": "default"}, "Chart": {}}
    defined: dict[str, list[Node]] = {}
    templates = {}
    for path in sorted((folder / "templates").iterdir()):
        nodes = _parse(path.read_text())
        for node in nodes:
            if node.kind == "define":
                defined[_unquote(node.text)] = node.then
        templates[path.name] = nodes
    texts = {name: _render(nodes, root, defined) for name, nodes in templates.items() if name.endswith(".yaml")}
    return {name: [each for each in yaml.safe_load_all(text) if each] for name, text in texts.items()}


def render_text(text: str, context: Any) -> str:
    """One template without definitions."""
    return _render(_parse(text), context, {})


def _parse(text: str) -> list[Node]:
    stack: list[list[Node]] = [[]]
    open_blocks: list[Node] = []
    position, trims_next = 0, False
    for match in _ACTION.finditer(text):
        before = text[position : match.start()]
        before = before.lstrip() if trims_next else before
        before = before.rstrip() if match[1] else before
        stack[-1].append(Node("text", before))
        position, trims_next = match.end(), bool(match[3])
        word, _, rest = match[2].partition(" ")
        if word in ("if", "with", "define"):
            node = Node(word, rest.strip())
            stack[-1].append(node)
            open_blocks.append(node)
            stack.append(node.then)
        elif word == "else" and not rest:
            stack[-1] = open_blocks[-1].otherwise
        elif word == "end":
            open_blocks.pop()
            stack.pop()
        else:
            stack[-1].append(Node("value", match[2]))
    tail = text[position:]
    stack[-1].append(Node("text", tail.lstrip() if trims_next else tail))
    assert not open_blocks, f"{open_blocks[-1].kind} {open_blocks[-1].text} has no end"
    return stack[0]


def _render(nodes: list[Node], context: Any, defined: dict[str, list[Node]]) -> str:
    parts = []
    for node in nodes:
        if node.kind == "text":
            parts.append(node.text)
        elif node.kind == "value":
            parts.append(_show(_evaluate(node.text, context, defined)))
        elif node.kind in ("if", "with"):
            value = _evaluate(node.text, context, defined)
            inner = value if node.kind == "with" and value else context
            parts.append(_render(node.then if value else node.otherwise, inner, defined))
    return "".join(parts)


def _evaluate(text: str, context: Any, defined: dict[str, list[Node]]) -> Any:
    def include(name: str, inner: Any) -> str:
        return _render(defined[name], inner, defined)

    functions: dict[str, Callable[..., Any]] = {
        "include": include,
        "default": lambda fallback, value: value or fallback,
        "eq": lambda left, right: left == right,
        "ne": lambda left, right: left != right,
        "quote": lambda value: f'"{_show(value)}"',
        "toYaml": lambda value: yaml.safe_dump(value).rstrip("\n"),
        "nindent": lambda width, value: "".join(f"\n{' ' * width}{line}".rstrip(" ") for line in value.split("\n")),
    }
    words = _WORD.findall(text)
    commands: list[list[str]] = [[]]
    for word in words:
        if word == "|":
            commands.append([])
        else:
            commands[-1].append(word)
    result: Any = None
    for index, command in enumerate(commands):
        arguments = [_operand(word, context) for word in command[1:]] + ([result] if index else [])
        if command[0] in functions:
            result = functions[command[0]](*arguments)
        else:
            assert not arguments, f"unknown function {command[0]}"
            result = _operand(command[0], context)
    return result


def _operand(word: str, context: Any) -> Any:
    if word.startswith('"'):
        return _unquote(word)
    if re.fullmatch(r"-?\d+", word):
        return int(word)
    assert word.startswith("."), f"unknown word {word}"
    value = context
    for key in word.split(".")[1:]:
        if key:
            assert key in value, f"no value {word}"
            value = value[key]
    return value


def _unquote(word: str) -> str:
    return word.strip().strip('"')


def _show(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
