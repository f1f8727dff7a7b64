"""Conversations to prompts, by the chat template that a checkpoint carries.

Templates are rendered as transformers renders them: block trimming, loop controls, `raise_exception`,
`strftime_now`, JSON without escaping. They come from the model's files only, and run in a sandbox that lets them
change nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gyrfalcon.errors import ModelLoadError, TemplateError
from gyrfalcon.service.interface import ChatMessage
from gyrfalcon.service.tokenizer import TextTokenizer, read_json_object

MAX_RENDERED_CHARS = 1 << 20
MAX_REASON_CHARS = 200


class ChatTemplate:
    """A compiled chat template with the tokenizer's own bos and eos texts."""

    def __init__(
        self,
        source: str,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        max_chars: int = MAX_RENDERED_CHARS,
    ) -> None:
        """max_chars: most it may write. Raises ModelLoadError when the source is not a template."""
        self.source = source
        self.bos_token = bos_token or ""
        self.eos_token = eos_token or ""
        self.max_chars = max_chars
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelLoadError(f"chat template: line {error.lineno}: {error.message}") from error

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The prompt that makes the model answer, or continue the last message where that is the assistant's.

        Raises TemplateError when the template refuses the messages, fails on them, or writes too much.
        """
        continues = messages[-1].role == "assistant"
        variables: dict[str, Any] = {
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "add_generation_prompt": not continues,
            "tools": None,
            "documents": None,
            # Templates expect text, also from a tokenizer that has no such token.
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
        }
        parts: list[str] = []
        num_chars = 0
        try:
            for part in self._template.generate(variables):
                parts.append(part)
                num_chars += len(part)
                if num_chars > self.max_chars:
                    raise TemplateError(f"the chat template wrote more than {self.max_chars} characters")
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template refused the messages: {_short(error)}") from error
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
            raise TemplateError(f"the chat template failed on the messages: {_short(error)}") from error
        prompt = "".join(parts)
        return self._cut_after(prompt, messages[-1].content.strip()) if continues else prompt

    @staticmethod
    def _cut_after(prompt: str, content: str) -> str:
        """The prompt up to the end of the message that is to be continued."""
        found = prompt.rfind(content)
        if found < 0:
            raise TemplateError("the chat template changed the last message, so that it cannot be continued")
        return prompt[: found + len(content)]


def load_chat_template(
    folder: Path,
    tokenizer: TextTokenizer,
    override: Path | str | None = None,
    *,
    max_chars: int = MAX_RENDERED_CHARS,
) -> ChatTemplate | None:
    """The checkpoint's chat template, None where it has none.

    override: a template's own text to take instead, or a file: a template, or a JSON file with a `chat_template`.
    max_chars: most it may write.
    Raises ModelLoadError naming the file that is not readable as what it should be.
    """
    if isinstance(override, Path):
        source: str | None = _read_override(override)
    else:
        source = _read_source(folder) if override is None else override
    if source is None:
        return None
    return ChatTemplate(source, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token, max_chars=max_chars)


def _read_source(folder: Path) -> str | None:
    """The template's text, from the first of the files that have carried it over the years, newest form first."""
    jinja_file = folder / "chat_template.jinja"
    if jinja_file.is_file():
        return _read_text(jinja_file)
    for name in ("chat_template.json", "tokenizer_config.json"):
        entry = read_json_object(folder / name).get("chat_template")
        if entry is not None:
            return _pick_default(entry, name)
    return None


def _read_override(path: Path) -> str:
    if path.suffix != ".json":
        return _read_text(path)
    entry = read_json_object(path).get("chat_template")
    if entry is None:
        raise ModelLoadError(f"{path.name}: expected a `chat_template`")
    return _pick_default(entry, path.name)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path.name}: not readable as text ({error})") from error


def _pick_default(entry: object, file_name: str) -> str:
    """A single template, or of several named ones that named `default`."""
    if isinstance(entry, list):
        named = {item.get("name"): item.get("template") for item in entry if isinstance(item, dict)}
        entry = named.get("default")
    elif isinstance(entry, dict):
        entry = entry.get("default")
    if not isinstance(entry, str):
        raise ModelLoadError(f"{file_name}: expected `chat_template` to be a text or to have one named `default`")
    return entry


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's text for training; rendering it, the marks change nothing."""

    tags = {"generation"}  # noqa: RUF012  (as the library's base class declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON as it stands, where Jinja's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def _short(error: Exception) -> str:
    """The error's own words, without anything that looks like an address in memory."""
    text = str(error).partition("\n")[0] or type(error).__name__
    return text.split(" at 0x")[0][:MAX_REASON_CHARS]
