"""`gyrfalcon kaito`: every option of KAITO's inference service, its class, and what comes of it."""

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
from gyrfalcon.cli import kaito as kaito_module
from gyrfalcon.cli import serve as serve_module
from gyrfalcon.cli.foreign_options import Fate, ForeignOption
from gyrfalcon.cli.kaito import Arguments, KaitoCommand, kaito, kaito_command, plan_kaito, read_arguments
from gyrfalcon.cli.kaito_options import KAITO_OPTIONS
from gyrfalcon.cli.launch_plan import LaunchPlan
from gyrfalcon.config import OPTIONS, Settings
from gyrfalcon.errors import SettingsError
from tools.launcher_page import KAITO_PAGE, with_tables

# For every option of the service, but the model: a text that asks for something, and for an honoured one the setting
# that it makes.
EXAMPLES: dict[str, tuple[str, object]] = {
    "--pipeline": ("conversational", "conversational"),
    "--torch_dtype": ("bfloat16", "bfloat16"),
    "--device_map": ("cpu", "cpu"),
    "--allow_remote_files": ("true", False),
    "--revision": ("refs/pr/2", "refs/pr/2"),
    "--cache_dir": ("/data", Path("/data")),
    "--chat_template": ("/templates/falcon.jinja", Path("/templates/falcon.jinja")),
    "--served_model_name": ("house", "house"),
    "--trust_remote_code": ("true", None),
    "--disable_trust_remote_code": ("false", None),
    "--force_download": ("true", None),
    "--resume_download": ("false", None),
    "--proxies": ("http://me:hunter2@proxy", None),
    "--output_loading_info": ("true", None),
    "--combination_type": ("linear", None),
    "--load_in_4bit": ("true", None),
    "--load_in_8bit": ("true", None),
    "--from_tf": ("true", None),
    "--state_dict": ("weights.pt", None),
}
VARIABLES: dict[str, tuple[str, object]] = {"DEBUG_MODE": ("true", "debug"), "LOCAL_RANK": ("2", 5002)}
MODEL = {"pretrained_model_name_or_path": "owner/name"}

ONE_DEVICE = "one model runs on one device in this version"

ROWS = {row.option.label: row for row in KAITO_OPTIONS}
SWITCHES = [row.option.flag for row in KAITO_OPTIONS if row.option.flags and row.option.kind.is_switch]


def of_fate(fate: Fate) -> Any:
    rows = [row for row in KAITO_OPTIONS if row.fate is fate and row.option.label in EXAMPLES]
    return pytest.mark.parametrize("row", rows, ids=[row.name for row in rows])


def plan(
    *unknown: str, environ: dict[str, str] | None = None, root: Path = Path("/nowhere"), **flags: str
) -> LaunchPlan:
    """The plan for a model from the Hub, which needs no folder to be there."""
    return plan_kaito(Arguments(MODEL | flags, unknown), environ or {}, root=root)


@pytest.fixture(autouse=True)
def _a_bare_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in ("DEBUG_MODE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)


def test_it_has_exactly_the_services_options_and_each_has_an_example() -> None:
    assert set(ROWS) == {"--pretrained_model_name_or_path", *EXAMPLES, *VARIABLES}
    assert len(ROWS) == len(KAITO_OPTIONS)
    assert {name: row.option.variables for name, row in ROWS.items() if row.option.variables} == {
        "DEBUG_MODE": ("DEBUG_MODE",),
        "LOCAL_RANK": ("LOCAL_RANK",),
    }


@pytest.mark.parametrize("flag", ["--pretrained_model_name_or_path", *EXAMPLES])
def test_an_option_is_read_in_every_spelling(flag: str) -> None:
    expected = Arguments({flag.removeprefix("--"): "x=y"})
    dashed = "--" + flag.removeprefix("--").replace("_", "-")
    for spelling in (flag, dashed):
        assert read_arguments([spelling, "x=y"]) == expected
        assert read_arguments([f"{spelling}=x=y"]) == expected


@pytest.mark.parametrize("flag", SWITCHES)
def test_what_is_on_or_off_may_stand_alone_and_may_have_a_value(flag: str) -> None:
    name = flag.removeprefix("--")
    assert read_arguments([flag]).flags == {name: "true"}
    assert read_arguments([flag, "--pipeline", "x"]).flags == {name: "true", "pipeline": "x"}
    assert read_arguments([flag, "False"]).flags == {name: "False"}


def test_the_last_of_two_values_counts() -> None:
    assert read_arguments(["--revision", "a", "--revision=b"]).flags == {"revision": "b"}


@pytest.mark.parametrize("script", ["inference_api.py", "/workspace/tfs/inference_api.py"])
def test_the_services_script_may_stand_in_front(script: str) -> None:
    assert read_arguments([script, "--revision", "a"]) == Arguments({"revision": "a"})


def test_unknown_options_are_told_apart_from_known_ones_and_take_their_words_with_them() -> None:
    words = ["--foo", "a", "b", "--revision", "v", "--bar", "--foo=c", "-q", "--max-probe-steps", "6"]
    assert read_arguments(words) == Arguments({"revision": "v"}, ("--foo", "--bar", "-q", "--max-probe-steps"))


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["falcon-7b"], "`falcon-7b` belongs to no option"),
        (["--revision", "a", "b"], "`b` belongs to no option"),
        (["--revision", "a", "inference_api.py"], "`inference_api.py` belongs to no option"),
        (["--revision"], "--revision needs a value"),
        (["--torch-dtype", "--pipeline", "x"], "--torch-dtype needs a value"),
    ],
)
def test_words_without_option_and_options_without_value_are_wrong_usage(words: list[str], part: str) -> None:
    with pytest.raises(typer.BadParameter, match=part):
        read_arguments(words)


@of_fate(Fate.HONOURED)
def test_an_honoured_option_reaches_its_setting(row: ForeignOption) -> None:
    text, value = EXAMPLES[row.option.label]
    made = plan(**{row.name: text})
    assert getattr(made.settings, str(row.field)) == value
    assert getattr(made.settings, str(row.field)) != getattr(plan().settings, str(row.field))
    assert made.lines == ()


@pytest.mark.parametrize("variable", list(VARIABLES))
def test_a_variable_reaches_its_setting(variable: str) -> None:
    text, value = VARIABLES[variable]
    assert getattr(plan(environ={variable: text}).settings, str(ROWS[variable].field)) == value
    assert plan(environ={variable: text}).lines == ()


@of_fate(Fate.NO_EFFECT)
def test_an_option_without_effect_makes_one_line_and_changes_nothing(row: ForeignOption) -> None:
    text, _ = EXAMPLES[row.option.label]
    made = plan(**{row.name: text})
    assert made.settings == plan().settings
    shown = "the hidden value" if row.option.secret else f"`{text}`"
    assert made.lines == (f"{row.option.flag}: {shown} (flag) has no effect and can be left out: {row.reason}",)


@of_fate(Fate.REFUSED)
def test_a_refused_option_ends_with_one_line_that_names_option_value_and_remedy(row: ForeignOption) -> None:
    text, _ = EXAMPLES[row.option.label]
    with pytest.raises(SettingsError) as raised:
        plan(**{row.name: text})
    assert str(raised.value) == f"{row.option.flag}: `{text}` (flag) is refused: {row.reason}; {row.remedy}"
    assert row.remedy


@pytest.mark.parametrize("row", [row for row in KAITO_OPTIONS if row.quiet], ids=lambda row: row.name)
def test_a_value_that_asks_for_nothing_passes_without_a_line(row: ForeignOption) -> None:
    for value in row.quiet:
        assert plan(**{row.name: str(value).lower()}) == plan()


def test_without_options_the_services_defaults_hold() -> None:
    settings = plan().settings
    assert (settings.host, settings.port, settings.kaito_pipeline) == ("0.0.0.0", 5000, "text-generation")
    assert (settings.dtype, settings.device, settings.offline) == ("auto", "auto", True)
    assert (settings.revision, settings.log_level) == (None, "info")


@pytest.mark.parametrize(
    ("text", "dtype"),
    [("float32", "float32"), ("float", "float32"), ("float16", "float16"), ("half", "float16"), ("auto", "auto")],
)
def test_a_precision_may_have_torchs_other_names(text: str, dtype: str) -> None:
    assert plan(torch_dtype=text).settings.dtype == dtype


@pytest.mark.parametrize("text", ["balanced", "balanced_low_0", "sequential"])
def test_spreading_over_several_gpus_gets_a_line(text: str) -> None:
    made = plan(device_map=text)
    assert made.settings == plan().settings
    (line,) = made.lines
    assert line == f"--device_map: `{text}` (flag) has no effect and can be left out: {ONE_DEVICE}"
    assert plan(device_map="cuda:0").settings.device == "cuda"


def test_remote_files_are_allowed_by_their_option_alone() -> None:
    assert plan(allow_remote_files="false") == plan()
    assert plan(allow_remote_files="false", environ={"GYRFALCON_OFFLINE": "false"}).settings.offline is True
    assert plan(environ={"GYRFALCON_OFFLINE": "false"}).settings.offline is False


def test_a_chat_template_may_be_given_as_its_text() -> None:
    text = "{% for message in messages %}\n{{ message.content }}\n{% endfor %}"
    assert plan(chat_template=text).settings.chat_template == text


@pytest.mark.parametrize(("text", "level"), [("TRUE", "debug"), ("false", "info"), ("1", "info"), ("", "info")])
def test_debug_lines_are_logged_for_true_alone(text: str, level: str) -> None:
    assert plan(environ={"DEBUG_MODE": text}).settings.log_level == level


def test_our_own_variables_and_file_give_what_the_service_lacks(tmp_path: Path) -> None:
    (tmp_path / "gyrfalcon.toml").write_text("block_size = 16\nport = 1001\n", encoding="utf-8")
    settings = plan(
        revision="main", environ={"GYRFALCON_HOST": "127.0.0.1", "API_KEY": "hunter2", "GYRFALCON_REVISION": "v2"}
    ).settings
    assert (settings.block_size, settings.port, settings.host, settings.revision) == (16, 1001, "127.0.0.1", None)
    assert settings.api_key == ("hunter2",)
    environ = {"GYRFALCON_PORT": "81", "LOCAL_RANK": "1", "GYRFALCON_LOG_LEVEL": "error", "DEBUG_MODE": "true"}
    settings = plan(environ=environ).settings
    assert (settings.port, settings.log_level) == (81, "error")


def test_other_servers_names_of_what_the_options_give_do_not_count() -> None:
    names = {
        variable: "nothing it may hold"
        for option in OPTIONS
        if option.name in {"host", *(row.field for row in KAITO_OPTIONS)}
        for variable in option.variables[1:]
    }
    assert {"PORT", "HOSTNAME", "MODEL_ID", "DTYPE", "REVISION"} <= set(names)
    assert plan(environ=names | {"TRUST_REMOTE_CODE": "true"}) == plan()


@pytest.mark.parametrize(
    ("unknown", "line"),
    [
        ("--foo", "--foo: no option of KAITO's service, which passes over it; it has no effect"),
        ("--torch_dtyp", "--torch_dtyp: no option of KAITO's service, which passes over it; it has no effect; did you"),
        ("--port", "--port: no option of KAITO's service, which passes over it; it has no effect; GYRFALCON_PORT sets"),
        (
            "--max-batch-size",
            "--max-batch-size: no option of KAITO's service, which passes over it; it has no effect; G",
        ),
    ],
)
def test_an_option_that_the_service_does_not_know_gets_a_line(unknown: str, line: str) -> None:
    made = plan(unknown)
    assert made.settings == plan().settings
    assert len(made.lines) == 1
    assert made.lines[0].startswith(line)


def test_a_key_is_not_passed_over() -> None:
    with pytest.raises(SettingsError, match=r"^--api-key: is no option of this command; set .* GYRFALCON_API_KEY$"):
        plan("--api-key")


@pytest.mark.parametrize(
    ("flags", "environ", "message"),
    [
        ({"pipeline": "fill-mask"}, {}, "--pipeline: `fill-mask` (flag) is not one of text-generation, conversational"),
        ({"torch_dtype": "int8"}, {}, "--torch_dtype: `int8` (flag) is not one of float32, float16, bfloat16, auto"),
        ({"device_map": "cuda:1"}, {}, "--device_map: `cuda:1` (flag) is not one of auto, balanced,"),
        ({"load_in_4bit": "maybe"}, {}, "--load_in_4bit: `maybe` (flag) is not true or false"),
        ({"chat_template": " "}, {}, "--chat_template: ` ` (flag) is not a chat template or the path of one"),
        ({}, {"LOCAL_RANK": "one"}, "LOCAL_RANK: `one` (environment variable LOCAL_RANK) is not a whole number from 0"),
        ({}, {"LOCAL_RANK": "60536"}, "LOCAL_RANK: `60536` (environment variable LOCAL_RANK) is not a whole number"),
    ],
)
def test_wrong_values_end_with_one_line(flags: dict[str, str], environ: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError) as raised:
        plan(environ=environ, **flags)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


class TestModel:
    def model(self, root: Path, environ: dict[str, str] | None = None) -> str:
        return plan_kaito(Arguments({}), environ or {}, root=root).settings.model

    def test_the_first_folder_of_weights_is_served(self, tmp_path: Path) -> None:
        later, first = tmp_path / "workspace/weights", tmp_path / "workspace/tfs/weights"
        later.mkdir(parents=True)
        assert self.model(tmp_path) == str(later)
        first.mkdir(parents=True)
        assert self.model(tmp_path) == str(first)

    def test_without_any_a_line_says_so(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError) as raised:
            self.model(tmp_path)
        assert str(raised.value).startswith(
            f"--pretrained_model_name_or_path: not given, and there is no folder {tmp_path}/workspace/tfs/weights or "
            f"{tmp_path}/workspace/weights; give "
        )

    def test_our_own_variable_and_file_may_name_it(self, tmp_path: Path) -> None:
        assert self.model(tmp_path, {"GYRFALCON_MODEL": "eyas"}) == "eyas"
        (tmp_path / "gyrfalcon.toml").write_text('model = "falcon-7b"\n', encoding="utf-8")
        assert self.model(tmp_path) == "falcon-7b"

    def test_a_folder_is_named_by_its_path_and_has_no_revision(self, tmp_path: Path) -> None:
        made = plan(pretrained_model_name_or_path=str(tmp_path), revision="v1")
        assert (made.settings.revision, made.settings.served_model_name) == (None, str(tmp_path))
        assert made.lines == ("--revision: `v1` has no effect and can be left out: the model is a local folder",)
        assert plan(pretrained_model_name_or_path=str(tmp_path), revision="main").lines == ()


def test_adapters_keep_the_server_from_starting(tmp_path: Path) -> None:
    folder = tmp_path / "mnt/adapter"
    (folder / "notes").mkdir(parents=True)
    assert plan(root=tmp_path) == plan()
    (folder / "poems").mkdir()
    (folder / "poems/adapter_config.json").touch()
    with pytest.raises(SettingsError) as raised:
        plan(root=tmp_path)
    assert str(raised.value).startswith(f"{folder}: holds adapters (poems), which are not served in this version; take")


def test_it_writes_its_lines_and_serves(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    served: list[Settings] = []
    monkeypatch.setattr(serve_module, "run_server", served.append)
    monkeypatch.setattr("gyrfalcon.telemetry.setup_logging", lambda json_output, level: None)
    with caplog.at_level(logging.INFO):
        kaito(Arguments(MODEL | {"trust_remote_code": "true"}, ("--foo",)))
    assert served == [plan().settings]
    assert [(record.levelname, record.getMessage().partition(":")[0]) for record in caplog.records] == [
        ("WARNING", "--foo"),
        ("WARNING", "--trust_remote_code"),
    ]


def test_the_command_passes_on_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Arguments] = []
    monkeypatch.setattr(kaito_module, "kaito", seen.append)
    app = typer.Typer()
    app.command(cls=KaitoCommand)(kaito_command())
    words = ["inference_api.py", "--torch-dtype=bfloat16", "--load_in_8bit", "--foo", "1", "--chat_template", "{a}"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    flags = {"torch_dtype": "bfloat16", "load_in_8bit": "true", "chat_template": "{a}"}
    assert seen == [Arguments(flags, ("--foo",))]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "COLUMNS": "200", "TERM": "dumb"}
    command = [sys.executable, "-m", "gyrfalcon", "kaito", *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)


def test_a_refusal_is_one_line_and_exit_code_one() -> None:
    done = run("--pretrained_model_name_or_path=eyas", "--load_in_8bit")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("error: --load_in_8bit: `true` (flag) is refused: ")


def test_wrong_usage_is_exit_code_two() -> None:
    done = run("falcon-7b")
    assert done.returncode == 2
    assert "`falcon-7b` belongs to no option" in done.stderr
    assert "Traceback" not in done.stderr


def test_its_help_names_every_option_and_its_version_is_ours() -> None:
    text = run("--foo", "--help").stdout
    for row in KAITO_OPTIONS:
        assert all(flag in text for flag in row.option.flags)
    assert run("-V").stdout == f"gyrfalcon {__version__}\n"


def test_the_page_has_the_tables_of_the_code() -> None:
    page = KAITO_PAGE.read_text(encoding="utf-8")
    assert page == with_tables(KAITO_PAGE), "run python tools/launcher_page.py"
    for label in ROWS:
        assert f"`{label}`" in page
