"""`gyrfalcon kaito`: the command line of KAITO's inference service keeps working."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from gyrfalcon.cli.flags import version_parameter
from gyrfalcon.cli.foreign_options import Given, find_options, judge
from gyrfalcon.cli.kaito_options import ADAPTERS_FOLDER, FIRST_PORT, KAITO_OPTIONS, MAIN, WEIGHTS_FOLDERS
from gyrfalcon.cli.launch_plan import LaunchPlan, fit_to_folder, start_logging
from gyrfalcon.config import OPTIONS, resolve
from gyrfalcon.errors import SettingsError

# What a manifest's command has before the options, where only the words up to it were replaced.
SCRIPT = "inference_api.py"
SPREADING = ("balanced", "balanced_low_0", "sequential")
_HELP = ("--help", "-h", "--version", "-V")
_FLAGS = {row.name: row for row in KAITO_OPTIONS if row.option.flags}
_SETTINGS = {option.name: option for option in OPTIONS}


@dataclass(frozen=True, slots=True)
class Arguments:
    """A command line of the service: texts by option name, and the options that the service does not know."""

    flags: dict[str, str]
    unknown: tuple[str, ...] = ()


def kaito(arguments: Arguments) -> None:
    """Serve with the command line of KAITO's inference service (inference_api.py), on port 5000.

    Options are written `--name value` or `--name=value`, with underscores or dashes; what is on or off may stand
    alone. Each is honoured, or has no effect and gets a line at start that says why, or is refused. Options that the
    service does not know are passed over with a line, as it passes over them. Everything else is set by GYRFALCON_
    variables and in gyrfalcon.toml, as for `gyrfalcon serve`.
    """
    # The options are explained without loading what serving takes.
    from gyrfalcon.cli.serve import run_server

    plan = plan_kaito(arguments, os.environ)
    start_logging(plan)
    run_server(plan.settings)


class KaitoCommand(TyperCommand):
    """A command that reads its arguments as the service does, and shows its options as any other."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        asked = [word for word in args if word in _HELP]
        if asked:
            return super().parse_args(ctx, asked[:1])
        read = read_arguments(args)
        rest = super().parse_args(ctx, [])
        ctx.params |= read.flags
        ctx.args = list(read.unknown)
        return rest


def kaito_command() -> Callable[..., None]:
    """`kaito` as a function for KaitoCommand, with one parameter for each of its options."""
    parameters = [
        inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
        *(_parameter(name) for name in _FLAGS),
        version_parameter(),
    ]

    def command(context: typer.Context, **given: Any) -> None:
        flags = {name: given[name] for name in _FLAGS if given[name] is not None}
        kaito(Arguments(flags, tuple(context.args)))

    command.__name__ = kaito.__name__
    command.__doc__ = kaito.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _parameter(name: str) -> inspect.Parameter:
    """A text parameter, also for a switch: the service takes `--load_in_4bit false`."""
    option = _FLAGS[name].option
    default = "" if option.default in (None, False) else f" [default {option.default}]"
    info = typer.Option(
        option.flag,
        metavar="[true|false]" if option.kind.is_switch else option.kind.metavar,
        help=f"{option.help}{default}",
        rich_help_panel=option.group,
        show_default=False,
    )
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, info])


def read_arguments(words: Sequence[str]) -> Arguments:
    """Read a command line as the service does; of an option that is given twice the last counts.

    Words after an option that it does not know belong to that option. Raises a usage error for a missing value and
    for a word that belongs to no option.
    """
    rest = deque(words)
    if rest and Path(rest[0]).name == SCRIPT:
        rest.popleft()
    flags: dict[str, str] = {}
    unknown: list[str] = []
    while rest:
        word = rest.popleft()
        if not word.startswith("-"):
            raise typer.BadParameter(
                f"`{word}` belongs to no option; a model is given as --pretrained_model_name_or_path"
            )
        spelling, equals, value = word.partition("=")
        row = _FLAGS.get(_field_name(spelling)) if spelling.startswith("--") else None
        if row is None:
            unknown.append(spelling)
            while rest and not rest[0].startswith("-"):
                rest.popleft()
        elif equals:
            flags[row.name] = value
        elif rest and not rest[0].startswith("-"):
            flags[row.name] = rest.popleft()
        elif row.option.kind.is_switch:
            flags[row.name] = "true"
        else:
            raise typer.BadParameter(f"{spelling} needs a value")
    return Arguments(flags, tuple(dict.fromkeys(unknown)))


def _field_name(spelling: str) -> str:
    return spelling.lstrip("-").replace("-", "_")


def plan_kaito(arguments: Arguments, environ: Mapping[str, str], *, root: Path = Path("/")) -> LaunchPlan:
    """Read what was given as the service would, and say what this server makes of it.

    root: where the folders of weights and adapters are looked for. Options win over GYRFALCON_ variables, those over
    gyrfalcon.toml, and that over LOCAL_RANK and DEBUG_MODE, which only move the defaults.

    Raises SettingsError that names option and value: for a value that is wrong, for an option that asks for what this
    server cannot do, for adapters, and where there is no model.
    """
    given = find_options(KAITO_OPTIONS, arguments.flags, environ)
    lines = [*_pass_over(arguments.unknown), *_give_way(given), *judge(given)]
    _refuse_adapters(root)
    defaults = _defaults(given, root)
    settings = resolve(_as_flags(given), _without_plain_names(environ), defaults=defaults)
    if settings.model == defaults["model"] and "pretrained_model_name_or_path" not in given:
        _require_weights(settings.model, root)
    if settings.revision == MAIN:  # what is taken anyway, and no reason for a line where the model is a folder
        settings = dataclasses.replace(settings, revision=None)
    return LaunchPlan(fit_to_folder(settings, lines), tuple(lines))


def _pass_over(unknown: Sequence[str]) -> Iterator[str]:
    """A line for each option that the service does not know. Values stay out of sight: one may be a secret."""
    for spelling in unknown:
        name = _field_name(spelling)
        setting = _SETTINGS.get(name)
        if setting is not None and setting.secret:
            # A server that is open because its key was passed over would be worse than none.
            raise SettingsError(spelling, f"is no option of this command; set the variable {setting.variables[0]}")
        near = difflib.get_close_matches(name, _FLAGS, n=1, cutoff=0.8)
        hint = ""
        if setting is not None:
            hint = f"; {setting.variables[0]} sets it here"
        elif near:
            hint = f"; did you mean {_FLAGS[near[0]].option.flag}?"
        yield f"{spelling}: no option of KAITO's service, which passes over it; it has no effect{hint}"


def _give_way(given: dict[str, Given]) -> Iterator[str]:
    """Take out what has no effect with one device; a line for it."""
    device_map = given.get("device_map")
    if device_map is not None and device_map.value in SPREADING:
        del given["device_map"]
        yield device_map.no_effect("one model runs on one device in this version")


def _refuse_adapters(root: Path) -> None:
    folder = root / ADAPTERS_FOLDER
    names = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
    if names:
        raise SettingsError(
            str(folder),
            f"holds adapters ({', '.join(names)}), which are not served in this version; take them away, and serve a "
            "checkpoint that they are merged into",
        )


def _defaults(given: Mapping[str, Given], root: Path) -> dict[str, object]:
    """What holds where no source gives a setting, as far as this command differs from `serve`."""
    rank, debug = given.get("local_rank"), given.get("debug_mode")
    folders = [root / folder for folder in WEIGHTS_FOLDERS]
    defaults: dict[str, object] = {
        "host": "0.0.0.0",  # noqa: S104 - what a container's user expects
        "port": FIRST_PORT + int(str(rank.value if rank is not None else 0)),
        "model": str(next((folder for folder in folders if folder.is_dir()), folders[0])),
        "offline": True,
    }
    if debug is not None and str(debug.value).lower() == "true":
        defaults["log_level"] = "debug"
    return defaults


def _as_flags(given: Mapping[str, Given]) -> dict[str, object]:
    """The settings that the options give."""
    flags = {each.row.field: each.value for each in given.values() if each.row.field is not None and each.is_flag}
    allows_downloads = flags.get("offline")
    if allows_downloads is not None:
        flags["offline"] = not allows_downloads
    return flags


def _without_plain_names(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without the variables by which other servers name what the options give.

    The service does not read PORT or REVISION: in a manifest for it such a variable is meant for something else.
    """
    plain = dict(environ)
    for field in {"host", *(row.field for row in KAITO_OPTIONS if row.field is not None)}:
        for variable in _SETTINGS[field].variables[1:]:
            plain.pop(variable, None)
    plain.pop("TRUST_REMOTE_CODE", None)
    return plain


def _require_weights(model: str, root: Path) -> None:
    if not Path(model).is_dir():
        folders = " or ".join(str(root / folder) for folder in WEIGHTS_FOLDERS)
        raise SettingsError(
            "--pretrained_model_name_or_path",
            f"not given, and there is no folder {folders}; give a checkpoint folder, a preset, or a Hub id "
            "(with --allow_remote_files where it is to be downloaded)",
        )
