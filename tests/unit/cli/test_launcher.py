"""`gyrfalcon launcher`: every flag of text-generation-launcher, its class, and what comes of it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from gyrfalcon import __version__
from gyrfalcon.cli import launcher as launcher_module
from gyrfalcon.cli import serve as serve_module
from gyrfalcon.cli.foreign_options import Fate, ForeignOption, Given
from gyrfalcon.cli.launcher import launcher, launcher_command, plan_launch, show_environment
from gyrfalcon.cli.launcher_options import LAUNCHER_OPTIONS, find_given, unheeded_by_serve
from gyrfalcon.config import OPTIONS, Settings
from gyrfalcon.errors import SettingsError
from tools.launcher_page import LAUNCHER_PAGE, with_tables

# For every flag of text-generation-launcher: a text that asks for something and the value it spells. True: a switch,
# alone on the command line and `true` in its variable.
EXAMPLES: dict[str, tuple[str | bool, object]] = {
    "--model-id": ("falcon-7b", "falcon-7b"),
    "--revision": ("refs/pr/2", "refs/pr/2"),
    "--validation-workers": ("4", 4),
    "--sharded": ("true", "true"),
    "--num-shard": ("2", 2),
    "--quantize": ("gptq", "gptq"),
    "--speculate": ("3", 3),
    "--dtype": ("bfloat16", "bfloat16"),
    "--kv-cache-dtype": ("fp8_e5m2", "fp8_e5m2"),
    "--trust-remote-code": (True, True),
    "--max-concurrent-requests": ("7", 7),
    "--max-best-of": ("3", 3),
    "--max-stop-sequences": ("6", 6),
    "--max-top-n-tokens": ("6", 6),
    "--max-input-tokens": ("100", 100),
    "--max-input-length": ("100", 100),
    "--max-total-tokens": ("200", 200),
    "--waiting-served-ratio": ("0.5", 0.5),
    "--max-batch-prefill-tokens": ("512", 512),
    "--max-batch-total-tokens": ("4096", 4096),
    "--max-waiting-tokens": ("5", 5),
    "--max-batch-size": ("3", 3),
    "--cuda-graphs": ("1,2,64", (1, 2, 64)),
    "--hostname": ("10.1.2.3", "10.1.2.3"),
    "--port": ("81", 81),
    "--prometheus-port": ("9100", 9100),
    "--shard-uds-path": ("/tmp/shards", "/tmp/shards"),
    "--master-addr": ("10.0.0.1", "10.0.0.1"),
    "--master-port": ("29501", 29501),
    "--huggingface-hub-cache": ("/data", Path("/data")),
    "--weights-cache-override": ("/weights", Path("/weights")),
    "--disable-custom-kernels": (True, True),
    "--cuda-memory-fraction": ("0.8", 0.8),
    "--rope-scaling": ("dynamic", "dynamic"),
    "--rope-factor": ("2.0", 2.0),
    "--json-output": (True, True),
    "--otlp-endpoint": ("http://collector:4317", "http://collector:4317"),
    "--otlp-service-name": ("house", "house"),
    "--cors-allow-origin": ("https://a.example", ("https://a.example",)),
    "--api-key": ("hunter2", ("hunter2",)),
    "--watermark-gamma": ("0.25", 0.25),
    "--watermark-delta": ("3.0", 3.0),
    "--ngrok": (True, True),
    "--ngrok-authtoken": ("hunter3", "hunter3"),
    "--ngrok-edge": ("edge", "edge"),
    "--tokenizer-config-path": ("/a/tokenizer_config.json", Path("/a/tokenizer_config.json")),
    "--disable-grammar-support": (True, True),
    "--env": (True, True),
    "--max-client-batch-size": ("8", 8),
    "--lora-adapters": ("a/b,c=/d", "a/b,c=/d"),
    "--usage-stats": ("no-stack", "no-stack"),
    "--payload-limit": ("1000", 1000),
    "--enable-prefill-logprobs": (True, True),
    "--graceful-termination-timeout": ("9", 9),
}
# The same for the variables that have no flag and that we read.
VARIABLES: dict[str, tuple[str, object]] = {
    "LOG_LEVEL": ("warn", "warn"),
    "COMPUTE_TYPE": ("1-cpu", "1-cpu"),
    "PREFIX_CACHING": ("false", False),
    "LOG_COLORIZE": ("true", "true"),
    "ATTENTION": ("paged", "paged"),
    "PREFILL_CHUNKING": ("0", False),
    "TGI_WIGGLE_ROOM": ("0.9", "0.9"),
    "MAX_IMAGE_FETCH_SIZE": ("5", "5"),
    "AIP_PREDICT_ROUTE": ("/predict", "/predict"),
    "AIP_HEALTH_ROUTE": ("/live", "/live"),
    "HF_HUB_ENABLE_HF_TRANSFER": ("1", "1"),
}
MODEL = {"MODEL_ID": "falcon-7b"}  # without one there is a line about that

WITH_FLAG = tuple(row for row in LAUNCHER_OPTIONS if row.option.flags)
READ = tuple(row for row in LAUNCHER_OPTIONS if row.option.label in {**EXAMPLES, **VARIABLES} and row.name != "env")
EVERY_FLAG = [(row, flag) for row in WITH_FLAG for flag in row.option.flags]
# Every honoured option from its flag and from each of its variables.
HONOURED = [
    (row, source)
    for row in READ
    if row.fate is Fate.HONOURED
    for source in (*["flag"][: len(row.option.flags)], *row.option.variables)
    if source not in ("MODEL_ID", "HF_MODEL_ID")  # tested beside a given model
]
EVERY_VARIABLE = [(row, variable) for row in READ for variable in row.option.variables]


def of_fate(fate: Fate) -> Any:
    rows = [row for row in READ if row.fate is fate]
    return pytest.mark.parametrize("row", rows, ids=[row.option.label for row in rows])


def example(row: ForeignOption) -> tuple[str, object]:
    """The example's text as a variable has it, and its value."""
    text, value = {**EXAMPLES, **VARIABLES}[row.option.label]
    return ("true" if text is True else str(text)), value


@pytest.fixture(autouse=True)
def _a_bare_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for row in LAUNCHER_OPTIONS:
        for variable in row.option.variables:
            if not variable.startswith("HF_H"):  # the test run's own
                monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings that a server was started with."""
    seen: list[Settings] = []
    monkeypatch.setattr(serve_module, "run_server", seen.append)
    monkeypatch.setattr("gyrfalcon.telemetry.setup_logging", lambda json_output, level: None)
    return seen


def typed(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, object]:
    """What the command makes of its arguments, before they are read."""
    seen: list[dict[str, object]] = []
    monkeypatch.setattr(launcher_module, "launcher", seen.append)
    app = typer.Typer()
    app.command()(launcher_command())
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return seen[0]


def written(flag: str) -> list[str]:
    text = EXAMPLES[flag][0]
    return [flag] if text is True else [flag, str(text)]


def test_it_has_exactly_the_launchers_flags() -> None:
    assert [row.option.flag for row in WITH_FLAG] == list(EXAMPLES)
    assert [row.option.flags[1] for row in WITH_FLAG if len(row.option.flags) > 1] == ["-p", "-e", "-g"]


def test_each_flag_has_its_variable_and_no_name_is_taken_twice() -> None:
    for row in WITH_FLAG:
        own = row.option.flag.removeprefix("--").replace("-", "_").upper()
        assert row.option.variables[-1:] == (() if row.option.flag == "--env" else (own,))
    names = [name for row in LAUNCHER_OPTIONS for name in (*row.option.flags, *row.option.variables)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("row", "flag"), EVERY_FLAG, ids=[flag for _, flag in EVERY_FLAG])
def test_each_flag_is_accepted_on_the_command_line(
    row: ForeignOption, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, value = EXAMPLES[row.option.flag]
    arguments = [flag] if text is True else [flag, str(text)]
    flags = typed(monkeypatch, *arguments)
    assert [name for name, each in flags.items() if each is not None] == [row.name]
    assert row.option.kind.read(flags[row.name]) == value


@pytest.mark.parametrize("flag", [flag for flag, (text, _) in EXAMPLES.items() if text is not True])
def test_a_value_may_follow_an_equals_sign(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value = EXAMPLES[flag]
    row = next(row for row in WITH_FLAG if row.option.flag == flag)
    assert row.option.kind.read(typed(monkeypatch, f"{flag}={text}")[row.name]) == value


def test_all_flags_may_be_given_together(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = typed(monkeypatch, *(word for flag in EXAMPLES for word in written(flag)))
    assert all(value is not None for value in flags.values())


def test_a_list_may_be_given_by_repeating_its_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = typed(monkeypatch, "--cuda-graphs", "1,2", "--cuda-graphs", "4", "--cors-allow-origin", "https://a")
    given = find_given(flags, {})
    assert given["cuda_graphs"].value == (1, 2, 4)
    assert given["cors_allow_origin"].value == ("https://a",)


@pytest.mark.parametrize(("row", "variable"), EVERY_VARIABLE, ids=[variable for _, variable in EVERY_VARIABLE])
def test_each_variable_is_read(row: ForeignOption, variable: str) -> None:
    text, value = example(row)
    given = find_given({}, {variable: text})
    assert list(given) == [row.name]
    assert (given[row.name].value, given[row.name].origin) == (value, f"environment variable {variable}")


@pytest.mark.parametrize("row", [row for row in READ if row.option.flags], ids=lambda row: row.option.label)
def test_a_flag_wins_over_its_variable(row: ForeignOption) -> None:
    text, value = example(row)
    given = find_given({row.name: text}, dict.fromkeys(row.option.variables, "nothing it may hold"))
    assert (given[row.name].value, given[row.name].is_flag) == (value, True)


@pytest.mark.parametrize(("row", "source"), HONOURED, ids=[f"{row.name}-{source}" for row, source in HONOURED])
def test_an_honoured_option_reaches_its_setting(row: ForeignOption, source: str) -> None:
    text, _ = example(row)
    setting = next(option for option in OPTIONS if option.name == row.field)
    flags: dict[str, object] = {row.name: text} if source == "flag" else {}
    environ = {} if source == "flag" else {source: text}
    plan = plan_launch({"model_id": "other/model"} | flags, environ)
    without = plan_launch({"model_id": "other/model"}, {})
    assert getattr(plan.settings, setting.name) == setting.kind.read(text)
    assert getattr(plan.settings, setting.name) != getattr(without.settings, setting.name)
    assert plan.lines == ()


def test_the_models_variable_reaches_its_setting() -> None:
    assert plan_launch({}, {"MODEL_ID": "a/b"}).settings.model == "a/b"


@of_fate(Fate.NO_EFFECT)
def test_an_option_without_effect_makes_one_line_and_changes_nothing(row: ForeignOption) -> None:
    text, _ = example(row)
    variable = row.option.variables[-1]
    plan = plan_launch({}, MODEL | {variable: text})
    assert plan.settings == plan_launch({}, MODEL).settings
    (line,) = plan.lines
    assert line.startswith(f"{row.option.label}: ")
    assert f"(environment variable {variable}) has no effect and can be left out: {row.reason}" in line
    assert "\n" not in line
    assert (text in line) is not row.option.secret


@pytest.mark.parametrize("row", [row for row in READ if row.quiet and row.fate is not Fate.HONOURED])
def test_a_value_that_asks_for_nothing_passes_without_a_line(row: ForeignOption) -> None:
    for value in row.quiet:
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()
        plan = plan_launch({}, MODEL | {row.option.variables[-1]: text})
        assert (plan.settings, plan.lines) == (plan_launch({}, MODEL).settings, ())


@of_fate(Fate.REFUSED)
def test_a_refused_option_ends_with_one_line_that_names_flag_value_and_remedy(row: ForeignOption) -> None:
    text, _ = example(row)
    for flags, environ, origin in (
        ({row.name: text}, {}, "flag"),
        *(({}, {variable: text}, f"environment variable {variable}") for variable in row.option.variables),
    ):
        with pytest.raises(SettingsError) as raised:
            plan_launch(flags, MODEL | environ)
        message = str(raised.value)
        assert raised.value.setting == row.option.flag
        assert message == f"{row.option.flag}: `{text}` ({origin}) is refused: {row.reason}; {row.remedy}"
        assert row.remedy
        assert "\n" not in message


@pytest.mark.parametrize("variable", ["TRUST_REMOTE_CODE", "HF_MODEL_TRUST_REMOTE_CODE"])
def test_the_permission_to_run_a_models_code_is_accepted_and_not_used(variable: str, tmp_path: Path) -> None:
    asked = plan_launch({"trust_remote_code": True}, MODEL | {variable: "true"})
    assert asked.settings == plan_launch({}, MODEL).settings
    (line,) = asked.lines
    assert line.startswith("--trust-remote-code: `true` (flag) has no effect and can be left out: code from a model's")
    (tmp_path / "gyrfalcon.toml").write_text("trust_remote_code = true\n", encoding="utf-8")
    with pytest.raises(SettingsError, match="^--trust-remote-code: refused"):
        plan_launch({}, MODEL)


def test_without_arguments_the_launchers_defaults_hold() -> None:
    settings = plan_launch({}, MODEL).settings
    assert (settings.host, settings.port, settings.graceful_termination_timeout) == ("0.0.0.0", 3000, 90)
    assert (settings.max_best_of, settings.max_stop_sequences, settings.max_top_n_tokens) == (2, 4, 5)
    assert (settings.max_concurrent_requests, settings.payload_limit) == (128, 2_000_000)
    assert (settings.watermark_gamma, settings.watermark_delta) == (0.5, 2.0)
    assert (settings.max_input_tokens, settings.max_total_tokens, settings.kv_cache_fraction) == (None, None, None)


def test_without_a_model_the_bundled_one_is_served_and_a_line_says_so() -> None:
    plan = plan_launch({}, {})
    assert plan.settings.model == "eyas"
    assert plan.lines == ("--model-id: not given; the bundled demonstration model `eyas` is served",)
    assert plan_launch({"model_id": "eyas"}, {}).lines == ()


def test_an_empty_variable_counts_as_unset_save_the_key() -> None:
    empty = {variable: "" for row in READ for variable in row.option.variables if variable != "API_KEY"}
    assert plan_launch({"model_id": "falcon-7b"}, empty) == plan_launch({"model_id": "falcon-7b"}, {})
    with pytest.raises(SettingsError, match=r"^--api-key: the hidden value \(environment variable API_KEY\) is not"):
        plan_launch({}, {"API_KEY": ""})


def test_our_own_variables_and_file_give_what_the_launcher_lacks(tmp_path: Path) -> None:
    (tmp_path / "gyrfalcon.toml").write_text("block_size = 16\nport = 1001\nmax_best_of = 9\n", encoding="utf-8")
    settings = plan_launch({}, MODEL | {"PORT": "80", "GYRFALCON_DEVICE": "cpu", "GYRFALCON_DTYPE": "float32"}).settings
    assert (settings.block_size, settings.port, settings.max_best_of) == (16, 80, 9)
    assert (settings.device, settings.dtype) == ("cpu", "float32")
    assert plan_launch({}, MODEL | {"PORT": "80", "GYRFALCON_PORT": "81"}).settings.port == 81
    assert plan_launch({}, MODEL | {"PORT": "80", "GYRFALCON_PORT": "tcp://10.0.0.1:80"}).settings.port == 80


@pytest.mark.parametrize(
    ("flags", "environ", "port"),
    [
        ({}, {"PORT": "80"}, 80),
        ({}, {"AIP_HTTP_PORT": "8085", "PORT": "80"}, 8085),
        ({}, {"HF_MODEL_ID": "a/b"}, 8080),
        ({}, {"HF_MODEL_ID": "a/b", "PORT": "80"}, 8080),
        ({}, {"HF_MODEL_ID": "a/b", "AIP_HTTP_PORT": "8085"}, 8085),
        ({"port": "90"}, {"HF_MODEL_ID": "a/b", "AIP_HTTP_PORT": "8085", "PORT": "80"}, 90),
        ({}, {"HF_MODEL_ID": "a/b", "GYRFALCON_PORT": "91"}, 91),
    ],
)
def test_a_platforms_port_wins_over_the_plain_variable(
    flags: dict[str, object], environ: dict[str, str], port: int
) -> None:
    assert plan_launch(flags, environ).settings.port == port


def test_a_port_that_sagemaker_does_not_use_gets_a_line() -> None:
    (line,) = plan_launch({}, {"HF_MODEL_ID": "a/b", "PORT": "80"}).lines
    assert line.startswith("--port: `80` (environment variable PORT) has no effect")
    assert plan_launch({}, {"HF_MODEL_ID": "a/b", "PORT": "8080"}).lines == ()


def test_sagemakers_names_win_over_the_plain_ones() -> None:
    environ = {"HF_MODEL_ID": "a/b", "MODEL_ID": "c/d", "HF_MODEL_REVISION": "v1", "REVISION": "v2", "SM_NUM_GPUS": "1"}
    settings = plan_launch({}, environ | {"NUM_SHARD": "4"}).settings
    assert (settings.model, settings.revision) == ("a/b", "v1")


@pytest.mark.parametrize(
    ("flags", "environ", "host", "num_lines"),
    [
        ({}, {"HOSTNAME": "3f2a9c"}, "0.0.0.0", 0),  # what Docker puts there
        ({}, {"HOSTNAME": "10.1.2.3"}, "10.1.2.3", 0),
        ({"hostname": "::"}, {"HOSTNAME": "10.1.2.3"}, "::", 0),
        ({"hostname": "my-box"}, {"HOSTNAME": "10.1.2.3"}, "0.0.0.0", 1),
    ],
)
def test_a_host_that_is_no_address_means_all_of_them(
    flags: dict[str, object], environ: dict[str, str], host: str, num_lines: int
) -> None:
    plan = plan_launch(flags, MODEL | environ)
    assert (plan.settings.host, len(plan.lines)) == (host, num_lines)


def test_shards_do_not_count_where_sharding_is_off() -> None:
    (line,) = plan_launch({"sharded": "false"}, MODEL | {"NUM_SHARD": "4"}).lines
    assert line.startswith("--num-shard: `4`")
    assert line.endswith("--sharded is false")


def test_the_memory_fraction_sizes_the_cache_unless_it_is_whole_or_tokens_do() -> None:
    assert plan_launch({}, MODEL | {"CUDA_MEMORY_FRACTION": "0.8"}).settings.kv_cache_fraction == 0.8
    assert plan_launch({"cuda_memory_fraction": "0.8"}, MODEL).settings.kv_cache_fraction == 0.8
    assert plan_launch({}, MODEL | {"CUDA_MEMORY_FRACTION": "1.0"}) == plan_launch({}, MODEL)
    plan = plan_launch({"cuda_memory_fraction": "0.8", "max_batch_total_tokens": "4096"}, MODEL)
    assert (plan.settings.kv_cache_fraction, plan.settings.max_batch_total_tokens) == (None, 4096)
    assert plan.lines[0].startswith("--cuda-memory-fraction: `0.8` (flag) has no effect")


@pytest.mark.parametrize(
    ("text", "level", "num_lines"), [("debug", "debug", 0), ("WARN", "warning", 0), ("info,router=debug", "info", 1)]
)
def test_a_log_level_is_read_as_loosely_as_the_launcher_does(text: str, level: str, num_lines: int) -> None:
    plan = plan_launch({}, MODEL | {"LOG_LEVEL": text})
    assert (plan.settings.log_level, len(plan.lines)) == (level, num_lines)


def test_a_model_in_a_folder_has_no_revision_and_is_named_by_its_path(tmp_path: Path) -> None:
    plan = plan_launch({}, {"MODEL_ID": str(tmp_path), "REVISION": "main"})
    assert (plan.settings.revision, plan.settings.served_model_name) == (None, str(tmp_path))
    assert plan.lines == ("--revision: `main` has no effect and can be left out: the model is a local folder",)
    named = plan_launch({}, {"MODEL_ID": str(tmp_path), "GYRFALCON_SERVED_MODEL_NAME": "house"})
    assert named.settings.served_model_name == "house"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_input_tokens": "5", "max_input_length": "5"}, "--max-input-length: `5` is the old name of --max-input-"),
        ({"max_input_tokens": "9", "max_total_tokens": "9"}, "--max-input-tokens: 9 must be below --max-total-tokens"),
        ({"max_input_length": "9", "max_total_tokens": "9"}, "--max-input-tokens: 9 must be below --max-total-tokens"),
        ({"max_total_tokens": "9", "max_batch_total_tokens": "8"}, "--max-total-tokens: 9 exceeds --max-batch-total-"),
        (
            {"max_batch_prefill_tokens": "9", "max_batch_total_tokens": "8"},
            "--max-batch-prefill-tokens: 9 exceeds --max-batch-total-tokens (8); lower it to that",
        ),
        ({"validation_workers": "0"}, "--validation-workers: `0` (flag) is not a whole number from 1 up"),
        ({"max_batch_size": "0"}, "--max-batch-size: `0` (flag) is not a whole number from 1 up"),
        ({"quantize": "eetq"}, "--quantize: `eetq` (flag) is not one of int8, int4, gptq, awq, compressed-tensors"),
        ({"quantize": "bitsandbytes-nf4"}, "--quantize: `bitsandbytes-nf4` (flag) is not one of int8, int4, gptq,"),
        ({"cuda_graphs": ["1,x"]}, "--cuda-graphs: `1,x` (flag) is not a list in which each is a whole number from 0"),
        ({"port": "0"}, "--port: `0` (flag) is not a whole number from 1 to 65535"),
        ({"model_id": " "}, "--model-id: ` ` (flag) is not a line of text"),
        ({"api_key": ["hunter2,hunter3"]}, "--api-key: the hidden value (flag) holds a comma"),
    ],
)
def test_wrong_and_contradicting_values_end_with_one_line(flags: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError) as raised:
        plan_launch(flags, MODEL)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)
    assert "hunter" not in str(raised.value)


def test_several_keys_may_be_given_by_repeating_the_flag() -> None:
    assert plan_launch({"api_key": ["hunter2", "hunter3"]}, MODEL).settings.api_key == ("hunter2", "hunter3")


def test_a_secret_is_not_in_what_was_given() -> None:
    given: dict[str, Given] = find_given({"api_key": ["hunter2"]}, {"NGROK_AUTHTOKEN": "hunter3"})
    assert "hunter" not in repr(given)


def test_it_writes_its_lines_and_serves(served: list[Settings], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        launcher({"model_id": "falcon-7b", "validation_workers": "4"})
    assert served == [plan_launch({}, MODEL).settings]
    (record,) = caplog.records
    assert (record.levelname, record.getMessage().partition(":")[0]) == ("WARNING", "--validation-workers")


def test_the_environment_is_shown_without_secrets_and_then_served(
    served: list[Settings], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    launcher({"model_id": "falcon-7b", "api_key": ["hunter2"], "env": True})
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["gyrfalcon"].startswith(__version__)
    assert (rows["model"], rows["api_key"], rows["max_best_of"]) == ("falcon-7b", "(hidden)", "2")
    assert len(served) == 1
    with caplog.at_level(logging.INFO):
        show_environment(Settings(json_output=True, api_key=("hunter2",)))
    assert caplog.records[-1].__dict__["api_key"] == "(hidden)"
    assert capsys.readouterr().out == ""


def test_serve_says_which_variables_it_does_not_heed(
    served: list[Settings], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KV_CACHE_DTYPE", "fp8_e5m2")
    monkeypatch.setenv("SM_NUM_GPUS", "4")
    monkeypatch.setenv("ROPE_FACTOR", "x")
    monkeypatch.setenv("VALIDATION_WORKERS", "4")  # changes nothing, so nothing is said
    serve_module.serve(Settings())
    lines = [record.getMessage() for record in caplog.records]
    assert [line.partition(" is not heeded: ")[0] for line in lines] == [
        "--num-shard: `4` (environment variable SM_NUM_GPUS)",
        "--kv-cache-dtype: `fp8_e5m2` (environment variable KV_CACHE_DTYPE)",
        "--rope-factor: `x` (environment variable ROPE_FACTOR)",
    ]
    assert served == [Settings()]


def test_serve_is_silent_about_variables_that_ask_for_nothing() -> None:
    assert unheeded_by_serve({"KV_CACHE_DTYPE": "", "NUM_SHARD": "1", "NGROK": "false", "SHARDED": "false"}) == []


def test_the_page_has_the_tables_of_the_code() -> None:
    page = LAUNCHER_PAGE.read_text(encoding="utf-8")
    assert page == with_tables(LAUNCHER_PAGE), "run python tools/launcher_page.py"
    for row in LAUNCHER_OPTIONS:
        for name in (*row.option.flags, *row.option.variables):
            assert f"`{name}`" in page


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "COLUMNS": "200", "TERM": "dumb", **variables}
    command = [sys.executable, "-m", "gyrfalcon", "launcher", *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--kv-cache-dtype", "fp8_e5m2"], 1, "error: --kv-cache-dtype: `fp8_e5m2` (flag) is refused: "),
        (["--max-input-tokens", "9", "--max-total-tokens", "9"], 1, "error: --max-input-tokens: 9 must be below"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_one(arguments: list[str], code: int, message: str) -> None:
    done = run(*arguments)
    assert done.returncode == code
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_wrong_usage_is_exit_code_two() -> None:
    assert "No such option: --no-json-output" in run("--no-json-output").stderr
    done = run("falcon-7b")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)


def test_its_help_names_every_flag_and_variable() -> None:
    text = run("--help").stdout
    for row in WITH_FLAG:
        for name in (*row.option.flags, *row.option.variables):
            assert name in text


def test_its_version() -> None:
    assert run("-V").stdout == f"gyrfalcon {__version__}\n"
