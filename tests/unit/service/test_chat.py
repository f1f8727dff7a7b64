from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from gyrfalcon.errors import ModelLoadError, TemplateError
from gyrfalcon.service.chat import MAX_RENDERED_CHARS, ChatTemplate, load_chat_template
from gyrfalcon.service.interface import ChatMessage
from gyrfalcon.service.tokenizer import TextTokenizer
from gyrfalcon.testing.text import CHAT_TEMPLATE

USER = ChatMessage("user", "Hi")
TURNS = (ChatMessage("system", "Be brief."), USER, ChatMessage("assistant", "Hello"), ChatMessage("user", "Who?"))

# The templates that differ in what the environment must provide.
TEMPLATES = {
    "blocks are trimmed": (
        "{% for m in messages %}\n    {% if m.role == 'user' %}\nU: {{ m.content }}\n    {% endif %}\n{% endfor %}"
    ),
    "tokens": "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
    "json": "{{ messages | tojson }} {{ {'a': '<é>'} | tojson(indent=2) }}",
    "loop controls": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{{ m.content }}{% break %}{% endfor %}"
    ),
    "generation marks": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "prompt for an answer": "{{ messages[-1].content }}{% if add_generation_prompt %}<answer>{% endif %}",
    "no tools": "{% if tools is none or not tools %}none{% endif %}",
    "string methods": "{{ messages[0].content.strip().upper().split('.')[0] }}",
    "namespaces": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
}


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_templates_render_as_transformers_renders_them(source: str) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    assert transformers
    messages = [{"role": turn.role, "content": turn.content} for turn in TURNS]
    (expected,), _ = render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    assert ChatTemplate(source, bos_token="<s>", eos_token="</s>").render(TURNS) == expected


def test_the_current_date_is_available() -> None:
    assert re.fullmatch(r"\d{4}-\d\d", ChatTemplate("{{ strftime_now('%Y-%m') }}").render([USER]))


def test_the_assistants_message_is_continued_when_it_comes_last() -> None:
    template = ChatTemplate(CHAT_TEMPLATE)
    assert template.render([USER]) == "User: Hi\nAssistant:"
    assert template.render([USER, ChatMessage("assistant", "Hello, ")]) == "User: Hi\nAssistant: Hello,"


def test_a_message_that_the_template_changes_cannot_be_continued() -> None:
    with pytest.raises(TemplateError, match="cannot be continued"):
        ChatTemplate("{{ messages[-1].content | upper }}").render([ChatMessage("assistant", "hello")])


def test_user_text_is_data() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    assert template.render([ChatMessage("user", "{{ 7 * 7 }} {% raw %}")]) == "{{ 7 * 7 }} {% raw %}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content.nothing }}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
    ],
)
def test_what_a_template_does_wrong_is_the_requests_error(source: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source).render([USER])


def test_the_templates_own_words_reach_the_caller() -> None:
    with pytest.raises(TemplateError, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render([USER])


def test_output_is_limited() -> None:
    source = "{% for i in range(2000) %}{{ messages[0].content }}{% endfor %}"
    with pytest.raises(TemplateError, match=str(MAX_RENDERED_CHARS)):
        ChatTemplate(source).render([ChatMessage("user", "x" * 1000)])


def test_a_template_with_a_syntax_error_fails_at_load() -> None:
    with pytest.raises(ModelLoadError, match="line 2"):
        ChatTemplate("fine\n{% if %}")


class TestLoading:
    def load(self, folder: Path, tokenizer: TextTokenizer, override: Path | str | None = None) -> str | None:
        template = load_chat_template(folder, tokenizer, override)
        return None if template is None else template.render([USER])

    def test_no_template_anywhere(self, tmp_path: Path, tokenizer: TextTokenizer) -> None:
        assert self.load(tmp_path, tokenizer) is None

    def test_in_tokenizer_config(self, tmp_path: Path, tokenizer: TextTokenizer) -> None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "config"}))
        assert self.load(tmp_path, tokenizer) == "config"

    def test_of_several_the_default(self, tmp_path: Path, tokenizer: TextTokenizer) -> None:
        named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
        assert self.load(tmp_path, tokenizer) == "default"

    def test_files_of_their_own_come_first(self, tmp_path: Path, tokenizer: TextTokenizer) -> None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "config"}))
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
        assert self.load(tmp_path, tokenizer) == "json"
        (tmp_path / "chat_template.jinja").write_text("jinja")
        assert self.load(tmp_path, tokenizer) == "jinja"

    @pytest.mark.parametrize(("name", "text"), [("own.jinja", "own"), ("own.json", '{"chat_template": "own"}')])
    def test_a_given_file_replaces_them(self, tmp_path: Path, tokenizer: TextTokenizer, name: str, text: str) -> None:
        (tmp_path / "chat_template.jinja").write_text("jinja")
        (tmp_path / name).write_text(text)
        assert self.load(tmp_path, tokenizer, tmp_path / name) == "own"

    def test_a_given_text_replaces_them(self, tmp_path: Path, tokenizer: TextTokenizer) -> None:
        (tmp_path / "chat_template.jinja").write_text("jinja")
        assert self.load(tmp_path, tokenizer, "own {{ messages | length }}") == "own 1"

    @pytest.mark.parametrize(("name", "text"), [("own.json", "{}"), ("own.json", '{"chat_template": 3}')])
    def test_a_given_file_without_one_is_an_error(
        self, tmp_path: Path, tokenizer: TextTokenizer, name: str, text: str
    ) -> None:
        (tmp_path / name).write_text(text)
        with pytest.raises(ModelLoadError, match=r"own\.json"):
            self.load(tmp_path, tokenizer, tmp_path / name)
        with pytest.raises(ModelLoadError, match=r"missing\.jinja"):
            self.load(tmp_path, tokenizer, tmp_path / "missing.jinja")

    def test_several_without_a_default_are_an_error(self, tmp_path: Path, tokenizer: TextTokenizer) -> None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": [{"name": "x", "template": ""}]}))
        with pytest.raises(ModelLoadError, match="default"):
            self.load(tmp_path, tokenizer)
