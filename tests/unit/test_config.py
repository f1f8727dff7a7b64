"""Settings: every option from every source, their precedence, and the messages of wrong ones."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from gyrfalcon.config import OPTIONS, Option, Settings, resolve
from gyrfalcon.errors import SettingsError

# For every setting: a text that is not its default, what it means, and its spelling in TOML.
EXAMPLES: dict[str, tuple[str, object, str]] = {
    "model": ("falcon-7b", "falcon-7b", '"falcon-7b"'),
    "revision": ("v1.2", "v1.2", '"v1.2"'),
    "dtype": ("bfloat16", "bfloat16", '"bfloat16"'),
    "quantize": ("int4", "int4", '"int4"'),
    "device": ("cpu", "cpu", '"cpu"'),
    "served_model_name": ("house", "house", '"house"'),
    "strict_model_names": ("true", True, "true"),
    "tokenizer_config_path": (
        "/a/tokenizer_config.json",
        Path("/a/tokenizer_config.json"),
        '"/a/tokenizer_config.json"',
    ),
    "chat_template": ("{{ messages }}", "{{ messages }}", '"{{ messages }}"'),
    "huggingface_hub_cache": ("/data", Path("/data"), '"/data"'),
    "offline": ("true", True, "true"),
    "host": ("0.0.0.0", "0.0.0.0", '"0.0.0.0"'),
    "port": ("9000", 9000, "9000"),
    "tls_certificate": ("/a/chain.pem", Path("/a/chain.pem"), '"/a/chain.pem"'),
    "tls_key": ("/a/key.pem", Path("/a/key.pem"), '"/a/key.pem"'),
    "cors_allow_origin": ("https://a.example", ("https://a.example",), '["https://a.example"]'),
    "payload_limit": ("1000", 1000, "1000"),
    "drain_delay": ("5", 5, "5"),
    "graceful_termination_timeout": ("9", 9, "9"),
    "compute_type": ("1-cpu", "1-cpu", '"1-cpu"'),
    "aip_predict_route": ("/predict", "/predict", '"/predict"'),
    "aip_health_route": ("/v1/live", "/v1/live", '"/v1/live"'),
    "kaito_pipeline": ("conversational", "conversational", '"conversational"'),
    "engine": ("local", "local", '"local"'),
    "api_key": ("one,two", ("one", "two"), '["one", "two"]'),
    "api_key_file": ("/a/keys", Path("/a/keys"), '"/a/keys"'),
    "key_max_concurrent_requests": ("3", 3, "3"),
    "key_requests_per_minute": ("60", 60, "60"),
    "key_max_queued_tokens": ("5000", 5000, "5000"),
    "open_metrics": ("true", True, "true"),
    "admin_port": ("9001", 9001, "9001"),
    "max_connections": ("50", 50, "50"),
    "max_connections_per_address": ("5", 5, "5"),
    "header_timeout": ("2.5", 2.5, "2.5"),
    "body_timeout": ("7", 7.0, "7"),
    "idle_timeout": ("9", 9.0, "9"),
    "stall_timeout": ("20", 20.0, "20"),
    "ping_interval": ("3", 3.0, "3"),
    "max_header_bytes": ("4096", 4096, "4096"),
    "max_header_fields": ("40", 40, "40"),
    "max_concurrent_requests": ("7", 7, "7"),
    "queue_timeout": ("4", 4.0, "4"),
    "max_queued_tokens": ("9000", 9000, "9000"),
    "max_json_depth": ("16", 16, "16"),
    "max_json_digits": ("40", 40, "40"),
    "max_prompts": ("4", 4, "4"),
    "max_messages": ("10", 10, "10"),
    "max_characters_per_token": ("8", 8, "8"),
    "max_return_sequences": ("2", 2, "2"),
    "max_best_of": ("2", 2, "2"),
    "max_stop_sequences": ("0", 0, "0"),
    "max_stop_length": ("100", 100, "100"),
    "max_biased_phrases": ("10", 10, "10"),
    "max_bad_words": ("20", 20, "20"),
    "max_top_n_tokens": ("5", 5, "5"),
    "max_input_tokens": ("100", 100, "100"),
    "max_total_tokens": ("200", 200, "200"),
    "default_max_new_tokens": ("fill", None, '"fill"'),
    "template_timeout": ("2.5", 2.5, "2.5"),
    "template_output_limit": ("5000", 5000, "5000"),
    "max_batch_size": ("3", 3, "3"),
    "max_batch_prefill_tokens": ("512", 512, "512"),
    "max_batch_total_tokens": ("4096", 4096, "4096"),
    "kv_cache_memory": ("2GiB", 2 * 1024**3, '"2GiB"'),
    "kv_cache_fraction": ("0.25", 0.25, "0.25"),
    "block_size": ("16", 16, "16"),
    "prefix_caching": ("false", False, "false"),
    "speculate": ("3", 3, "3"),
    "packed_cache": ("off", "off", '"off"'),
    "num_threads": ("2", 2, "2"),
    "watermark_gamma": ("0.25", 0.25, "0.25"),
    "watermark_delta": ("3", 3.0, "3"),
    "watermark_context_width": ("4", 4, "4"),
    "watermark_key": ("42", 42, "42"),
    "json_output": ("true", True, "true"),
    "log_level": ("warn", "warning", '"warn"'),
    "log_prompts": ("true", True, "true"),
    "otlp_endpoint": ("http://c:4318", "http://c:4318", '"http://c:4318"'),
    "otlp_service_name": ("house", "house", '"house"'),
}
EVERY_VARIABLE = [(option, variable) for option in OPTIONS for variable in option.variables]

every_option = pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)


def written(folder: Path, text: str) -> Path:
    path = folder / "settings.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_setting_has_an_example() -> None:
    assert list(EXAMPLES) == [item.name for item in fields(Settings)]


@every_option
def test_an_example_differs_from_the_default(option: Option) -> None:
    assert EXAMPLES[option.name][1] != getattr(Settings(), option.name)


@every_option
def test_a_flag_sets_it(option: Option) -> None:
    text, value, _ = EXAMPLES[option.name]
    assert getattr(resolve({option.name: text}, {}), option.name) == value


@pytest.mark.parametrize(("option", "variable"), EVERY_VARIABLE, ids=[variable for _, variable in EVERY_VARIABLE])
def test_each_of_its_variables_sets_it(option: Option, variable: str) -> None:
    text, value, _ = EXAMPLES[option.name]
    assert getattr(resolve({}, {variable: text}), option.name) == value


@every_option
def test_the_file_sets_it(option: Option, tmp_path: Path) -> None:
    _, value, literal = EXAMPLES[option.name]
    path = written(tmp_path, f"{option.name} = {literal}\n")
    assert getattr(resolve({}, {}, path), option.name) == value


@every_option
def test_it_may_be_given_its_own_value_directly(option: Option) -> None:
    value = EXAMPLES[option.name][1]
    assert getattr(Settings(**{option.name: value}), option.name) == value


def test_a_flag_wins_over_a_variable_and_a_variable_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "port = 1001\nmax_best_of = 3\nmax_batch_size = 5\n")
    environ = {"GYRFALCON_PORT": "1002", "MAX_BEST_OF": "2"}
    settings = resolve({"port": "1003"}, environ, path)
    assert (settings.port, settings.max_best_of, settings.max_batch_size) == (1003, 2, 5)


def test_our_own_variable_wins_over_a_foreign_one() -> None:
    assert resolve({}, {"PORT": "80", "GYRFALCON_PORT": "9000"}).port == 9000


def test_a_commands_defaults_give_way_to_every_source(tmp_path: Path) -> None:
    path = written(tmp_path, 'log_level = "error"\n')
    assert resolve({}, {}, defaults={"log_level": "warning"}).log_level == "warning"
    assert resolve({}, {}, path, defaults={"log_level": "warning"}).log_level == "error"


def test_the_file_is_the_one_given_else_the_variables_else_the_one_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, port in (("gyrfalcon.toml", 1001), ("named.toml", 1002), ("given.toml", 1003)):
        (tmp_path / name).write_text(f"port = {port}\n", encoding="utf-8")
    assert resolve({}, {}).port == 1001
    assert resolve({}, {"GYRFALCON_CONFIG": "named.toml"}).port == 1002
    assert resolve({}, {"GYRFALCON_CONFIG": "named.toml"}, Path("given.toml")).port == 1003


def test_without_any_source_the_defaults_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve({}, {}) == Settings()


@pytest.mark.parametrize(
    ("environ", "host", "port"),
    [
        ({"HOSTNAME": "3f2a9c"}, "127.0.0.1", 8080),  # a container's name
        ({"HOSTNAME": "10.1.2.3"}, "10.1.2.3", 8080),
        ({"GYRFALCON_HOST": "localhost"}, "localhost", 8080),
        ({"GYRFALCON_PORT": "tcp://10.0.0.1:80", "GYRFALCON_SERVICE_PORT": "80"}, "127.0.0.1", 8080),  # Kubernetes
        ({"GYRFALCON_PORT": "tcp://10.0.0.1:80", "PORT": "9000"}, "127.0.0.1", 9000),
        ({"PORT": ""}, "127.0.0.1", 8080),
    ],
)
def test_variables_that_platforms_set_for_themselves_are_passed_over(
    environ: dict[str, str], host: str, port: int
) -> None:
    settings = resolve({}, environ)
    assert (settings.host, settings.port) == (host, port)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("port", "0"), ("port", "65536"), ("port", "8080.5"), ("port", "1_000"), ("port", "٣"), ("port", "9" * 30),
        ("dtype", "float8"), ("device", "tpu"), ("engine", "thread"), ("log_level", "loud"),
        ("host", "http://a"), ("host", "a:80"), ("host", "a b"),
        ("max_best_of", "0"), ("max_total_tokens", "1"), ("max_concurrent_requests", "-1"),
        ("default_max_new_tokens", "-1"), ("block_size", "24"), ("block_size", "512"),
        ("kv_cache_memory", "2 apples"), ("kv_cache_memory", "0"), ("kv_cache_memory", "2ib"),
        ("kv_cache_fraction", "0"), ("kv_cache_fraction", "1.5"), ("kv_cache_fraction", "nan"),
        ("graceful_termination_timeout", "-1"), ("graceful_termination_timeout", "1.5"),
        ("watermark_gamma", "1"), ("watermark_delta", "1e999"), ("watermark_key", str(2**64)),
        ("aip_predict_route", "predict"), ("aip_health_route", "/"), ("aip_health_route", "/a?b"),
        ("prefix_caching", "maybe"), ("api_key", "one,,two"), ("api_key", ""), ("model", " "), ("model", "a\nb"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_with_its_flag_and_origin(name: str, text: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(SettingsError, match=rf"^{flag}: .* \(flag\) is not ") as raised:
        resolve({name: text}, {})
    assert raised.value.setting == flag
    variable = f"GYRFALCON_{name.upper()}"
    if text:  # an empty variable counts as unset
        with pytest.raises(SettingsError, match=rf"\(environment variable {variable}\) is not "):
            resolve({}, {variable: text})


@pytest.mark.parametrize(
    "line",
    ["port = true", "port = 80.0", "port = []", "prefix_caching = 1", 'dtype = ["float32"]', "api_key = [1]",
     "watermark_gamma = true", "kv_cache_memory = 1.5", 'max_batch_size = "three"'],
)  # fmt: skip
def test_a_value_of_the_wrong_type_in_the_file_is_refused_with_the_files_name(line: str, tmp_path: Path) -> None:
    path = written(tmp_path, line)
    with pytest.raises(SettingsError, match="is not") as raised:
        resolve({}, {}, path)
    assert str(path) in str(raised.value)


def test_the_message_says_what_is_allowed() -> None:
    with pytest.raises(SettingsError) as raised:
        resolve({}, {"MAX_BEST_OF": "many"})
    assert (
        str(raised.value) == "--max-best-of: `many` (environment variable MAX_BEST_OF) is not a whole number from 1 up"
    )


def test_an_unknown_key_in_the_file_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="unknown key `max_total_token`; did you mean `max_total_tokens`"):
        resolve({}, {}, written(tmp_path, "max_total_token = 5\n"))


def test_a_misspelt_variable_is_refused_and_a_foreign_one_is_not() -> None:
    with pytest.raises(SettingsError, match="GYRFALCON_MAX_TOTAL_TOKEN: .*did you mean `GYRFALCON_MAX_TOTAL_TOKENS`"):
        resolve({}, {"GYRFALCON_MAX_TOTAL_TOKEN": "5"})
    assert resolve({}, {"GYRFALCON_TEAM": "blue", "MAX_TOTAL_TOKEN": "5"}) == Settings()


@pytest.mark.parametrize(
    ("content", "part"),
    [(b"port = ", "not valid TOML"), (b"port = '\xff'", "not valid TOML"), (None, "cannot be read")],
)
def test_a_file_that_cannot_be_read_is_refused(content: bytes | None, part: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=f"^--config: .*{part}"):
        resolve({}, {}, path)


@pytest.mark.parametrize("value", ["true", "1", "yes please"])
def test_running_repository_code_is_refused_from_every_source(value: str, tmp_path: Path) -> None:
    for flags, environ, line in (
        ({"trust_remote_code": True}, {}, ""),
        ({}, {"TRUST_REMOTE_CODE": value}, ""),
        ({}, {}, f"trust_remote_code = '{value}'\n"),
    ):
        with pytest.raises(SettingsError, match="^--trust-remote-code: refused"):
            resolve(flags, environ, written(tmp_path, line))


def test_declining_repository_code_is_accepted() -> None:
    assert resolve({"trust_remote_code": False}, {"TRUST_REMOTE_CODE": "false"}) == Settings()


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"max_input_tokens": 100, "max_total_tokens": 100}, "--max-input-tokens: 100 must be below"),
        ({"max_total_tokens": 200, "max_batch_total_tokens": 100}, "--max-total-tokens: 200 exceeds"),
        ({"chat_template": "{}", "tokenizer_config_path": Path("t.json")}, "--chat-template: replaces the chat templ"),
        ({"kv_cache_memory": 10**9, "kv_cache_fraction": 0.5}, "--kv-cache-memory: sizes the KV cache"),
        ({"max_batch_total_tokens": 4096, "kv_cache_memory": 10**9}, "--max-batch-total-tokens: sizes the KV cache"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, object], part: str) -> None:
    with pytest.raises(SettingsError, match=part):
        Settings(**values)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("~/own.jinja", Path.home() / "own.jinja"),
        ("{{ messages }}", "{{ messages }}"),
        ("one\ntwo", "one\ntwo"),
        (" own.jinja ", Path("own.jinja")),
    ],
)
def test_a_chat_template_is_told_from_a_file_by_braces_and_line_breaks(text: str, value: object) -> None:
    assert resolve({"chat_template": text}, {}).chat_template == value


def test_an_empty_chat_template_is_refused() -> None:
    with pytest.raises(SettingsError, match="^--chat-template: ` ` .flag. is not a chat template or the path of one"):
        resolve({"chat_template": " "}, {})


@pytest.mark.parametrize(
    "values", [{"port": 0}, {"port": "8080"}, {"port": True}, {"api_key": ["one"]}, {"dtype": "BFloat16"}, {"host": ""}]
)
def test_settings_made_directly_are_checked_too(values: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        Settings(**values)


def test_settings_cannot_change() -> None:
    with pytest.raises(FrozenInstanceError):
        Settings().port = 1  # type: ignore[misc]


def test_secrets_are_never_shown() -> None:
    settings = Settings(api_key=("hunter2",), watermark_key=987654321)
    for text in (repr(settings), str(settings.shown())):
        assert "hunter2" not in text
        assert "987654321" not in text
    assert settings.shown()["api_key"] == "(hidden)"
    with pytest.raises(SettingsError) as raised:
        resolve({}, {"GYRFALCON_WATERMARK_KEY": "hunter2"})
    assert "hunter2" not in str(raised.value)


def test_an_empty_secret_is_an_error_not_an_open_server() -> None:
    with pytest.raises(SettingsError, match="^--api-key"):
        resolve({}, {"API_KEY": ""})


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("1", 1),
        ("1024", 1024),
        ("2k", 2000),
        ("2KiB", 2048),
        ("1.5 GB", 1_500_000_000),
        ("3Mi", 3 * 1024**2),
        ("1t", 10**12),
    ],
)
def test_sizes_are_read_with_their_units(text: str, num_bytes: int) -> None:
    assert resolve({"kv_cache_memory": text}, {}).kv_cache_memory == num_bytes


def test_auto_takes_back_what_a_lower_source_says() -> None:
    assert resolve({"max_total_tokens": "auto"}, {"MAX_TOTAL_TOKENS": "100"}).max_total_tokens is None


def test_a_path_may_begin_with_the_home_folder() -> None:
    assert resolve({"huggingface_hub_cache": "~/hub"}, {}).huggingface_hub_cache == Path.home() / "hub"
