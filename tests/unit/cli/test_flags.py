"""Flags: each option reaches the settings from the command line, as it does from variables and files."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from gyrfalcon.cli.flags import command_with_settings
from gyrfalcon.config import OPTIONS, Option, Settings
from gyrfalcon.errors import SettingsError

# For every option: what is typed after its flag, and the value it makes; a switch is typed alone.
TYPED: dict[str, tuple[str | None, object]] = {
    "model": ("falcon-7b", "falcon-7b"),
    "revision": ("main", "main"),
    "packed_cache": ("off", "off"),
    "dtype": ("float32", "float32"),
    "quantize": ("int8", "int8"),
    "device": ("cpu", "cpu"),
    "served_model_name": ("house", "house"),
    "strict_model_names": (None, True),
    "tokenizer_config_path": ("a.json", Path("a.json")),
    "chat_template": ("a.jinja", Path("a.jinja")),
    "offline": (None, True),
    "huggingface_hub_cache": ("hub", Path("hub")),
    "host": ("::1", "::1"),
    "port": ("81", 81),
    "api_key": ("one", ("one",)),
    "cors_allow_origin": ("https://a.example", ("https://a.example",)),
    "payload_limit": ("9", 9),
    "graceful_termination_timeout": ("9", 9),
    "compute_type": ("x", "x"),
    "kaito_pipeline": ("conversational", "conversational"),
    "engine": ("local", "local"),
    "max_concurrent_requests": ("9", 9),
    "max_best_of": ("9", 9),
    "max_stop_sequences": ("9", 9),
    "max_top_n_tokens": ("9", 9),
    "max_input_tokens": ("9", 9),
    "max_total_tokens": ("9", 9),
    "default_max_new_tokens": ("0", None),
    "max_batch_size": ("9", 9),
    "max_batch_prefill_tokens": ("9", 9),
    "max_batch_total_tokens": ("9", 9),
    "kv_cache_memory": ("9MB", 9_000_000),
    "kv_cache_fraction": ("0.9", 0.9),
    "block_size": ("8", 8),
    "prefix_caching": (None, True),
    "speculate": ("5", 5),
    "num_threads": ("9", 9),
    "watermark_gamma": ("0.9", 0.9),
    "watermark_delta": ("9", 9.0),
    "watermark_context_width": ("3", 3),
    "watermark_key": ("9", 9),
    "json_output": (None, True),
    "log_level": ("error", "error"),
    "aip_predict_route": ("/predict", "/predict"),
    "aip_health_route": ("/live", "/live"),
    "tls_certificate": ("chain.pem", Path("chain.pem")),
    "tls_key": ("key.pem", Path("key.pem")),
    "drain_delay": ("9", 9),
    "api_key_file": ("keys", Path("keys")),
    "key_max_concurrent_requests": ("9", 9),
    "key_requests_per_minute": ("9", 9),
    "key_max_queued_tokens": ("9", 9),
    "open_metrics": (None, True),
    "admin_port": ("9", 9),
    "max_connections": ("9", 9),
    "max_connections_per_address": ("9", 9),
    "header_timeout": ("0.9", 0.9),
    "body_timeout": ("0.9", 0.9),
    "idle_timeout": ("0.9", 0.9),
    "stall_timeout": ("0.9", 0.9),
    "ping_interval": ("0.9", 0.9),
    "max_header_bytes": ("9000", 9000),
    "max_header_fields": ("99", 99),
    "queue_timeout": ("0.9", 0.9),
    "max_queued_tokens": ("9", 9),
    "max_json_depth": ("9", 9),
    "max_json_digits": ("99", 99),
    "max_prompts": ("9", 9),
    "max_messages": ("9", 9),
    "max_characters_per_token": ("9", 9),
    "max_return_sequences": ("9", 9),
    "max_stop_length": ("9", 9),
    "max_biased_phrases": ("9", 9),
    "max_bad_words": ("9", 9),
    "template_timeout": ("0.9", 0.9),
    "template_output_limit": ("9", 9),
    "log_prompts": (None, True),
    "otlp_endpoint": ("http://c:4318", "http://c:4318"),
    "otlp_service_name": ("house", "house"),
}
EVERY_FLAG = [(option, flag) for option in OPTIONS for flag in option.flags]


def run(arguments: list[str], *, declared: tuple[Option, ...] = OPTIONS) -> Settings:
    """The settings that a command resolves from its arguments."""
    seen: list[Settings] = []

    def look(settings: Settings) -> None:
        seen.append(settings)

    app = typer.Typer()
    app.command()(command_with_settings(look, declared, positional=True))
    result = CliRunner().invoke(app, arguments)
    if isinstance(result.exception, SettingsError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return seen[0]


@pytest.fixture(autouse=True)
def _in_a_folder_without_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_without_arguments_the_defaults_hold() -> None:
    assert run([]) == Settings()


@pytest.mark.parametrize(("option", "flag"), EVERY_FLAG, ids=[flag for _, flag in EVERY_FLAG])
def test_each_flag_reaches_its_setting(option: Option, flag: str) -> None:
    text, value = TYPED[option.name]
    assert getattr(run([flag] if text is None else [flag, text]), option.name) == value


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.kind.is_switch], ids=lambda each: each.name)
def test_each_switch_can_be_turned_off_against_its_variable(option: Option, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(option.variables[0], "true")
    off = f"--no-{option.flag.removeprefix('--')}"
    assert getattr(run([]), option.name) is True
    assert getattr(run([off]), option.name) is False


def test_a_list_may_be_given_by_repeating_its_flag() -> None:
    assert run(["--api-key", "one", "--api-key", "two,three"]).api_key == ("one", "two", "three")


def test_the_model_may_be_the_argument() -> None:
    assert run(["falcon-7b"]).model == "falcon-7b"
    assert run(["falcon-7b", "--model", "falcon-7b"]).model == "falcon-7b"
    with pytest.raises(SettingsError, match="`eyas` contradicts the argument MODEL `falcon-7b`"):
        run(["falcon-7b", "--model", "eyas"])


def test_the_config_flag_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("port = 81\n", encoding="utf-8")
    assert run(["--config", "mine.toml"]).port == 81


def test_a_flag_wins_over_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "80")
    assert run([]).port == 80
    assert run(["--port", "81"]).port == 81


def test_a_wrong_value_is_told_by_the_same_rules_as_elsewhere() -> None:
    with pytest.raises(SettingsError, match=r"^--port: `x` \(flag\) is not a whole number from 1 to 65535"):
        run(["--port", "x"])


def test_running_repository_code_is_refused() -> None:
    with pytest.raises(SettingsError, match="^--trust-remote-code: refused"):
        run(["--trust-remote-code"])


def test_a_command_with_some_options_takes_the_others_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_BEST_OF", "3")
    some = tuple(option for option in OPTIONS if option.name in ("model", "dtype"))
    settings = run(["--dtype", "float16"], declared=some)
    assert (settings.dtype, settings.max_best_of) == ("float16", 3)
