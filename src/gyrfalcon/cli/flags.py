"""Flags of a command, made from the options' declarations."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from gyrfalcon import __version__
from gyrfalcon.config import CONFIG_VARIABLE, REFUSED, resolve
from gyrfalcon.errors import SettingsError
from gyrfalcon.options import Option


def command_with_settings(
    function: Callable[..., None], declared: Iterable[Option], *, positional: bool = False
) -> Callable[..., None]:
    """A command that resolves `declared` into Settings and passes them to `function` as its first argument.

    The function's other parameters stay as they are. positional: an option may also be given as the argument it
    declares. The defaults are those of `declared`. Values go to `config.resolve` as they were typed, so that all
    sources are read by the same rules.
    """
    declared = tuple(declared)
    arguments = [option for option in declared if positional and option.positional]
    defaults = {option.name: option.default for option in declared}
    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    parameters = [
        *(_argument(option) for option in arguments),
        *own,
        *(flag_parameter(option) for option in declared),
        _config_flag(),
        *(_refused_flag(name) for name in REFUSED),
    ]

    @functools.wraps(function)
    def command(**given: Any) -> None:
        flags = {name: given.pop(name) for name in REFUSED}
        for option in declared:
            flags[option.name] = given.pop(option.name) or None if option.kind.is_list else given.pop(option.name)
        for option in arguments:
            _merge(option, given.pop(_argument_name(option)), flags)
        settings = resolve(flags, config_file=given.pop("config"), defaults=defaults)
        function(settings, **given)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def print_version(wanted: bool) -> None:
    """Callback of a --version flag: print it and end."""
    if wanted:
        print(f"gyrfalcon {__version__}")
        raise typer.Exit


def version_parameter() -> inspect.Parameter:
    """The --version flag of a command that has one of its own."""
    info = typer.Option("--version", "-V", help="Print the version.", callback=print_version, is_eager=True)
    return inspect.Parameter("version", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, info])


def _merge(option: Option, argument: str | None, flags: dict[str, Any]) -> None:
    given = flags[option.name]
    if argument is not None and given is not None and argument != given:
        raise SettingsError(option.flag, f"`{given}` contradicts the argument {option.positional} `{argument}`")
    flags[option.name] = argument if argument is not None else given


def _argument_name(option: Option) -> str:
    return f"{option.name}_argument"


def _argument(option: Option) -> inspect.Parameter:
    info = typer.Argument(metavar=option.positional, help=_help(option), show_default=False)
    return _parameter(_argument_name(option), Annotated[str | None, info])


def flag_parameter(option: Option, *, has_opposite: bool = True) -> inspect.Parameter:
    """The parameter of a command that takes the option's value as it is typed.

    has_opposite: a switch has a `--no-` form beside it.
    """
    common: dict[str, Any] = {"help": _help(option), "rich_help_panel": option.group, "show_default": False}
    if option.kind.is_switch:
        spelling = f"{option.flag}/--no-{option.flag.removeprefix('--')}" if has_opposite else option.flag
        return _parameter(option.name, Annotated[bool | None, typer.Option(spelling, *option.flags[1:], **common)])
    info = typer.Option(*option.flags, metavar=option.kind.metavar, **common)
    return _parameter(option.name, Annotated[(list[str] if option.kind.is_list else str) | None, info])


def _help(option: Option) -> str:
    notes = []
    if not option.secret and option.default not in (None, (), False):
        default = option.default
        notes.append(f"default {default:g}" if isinstance(default, float) else f"default {str(default).lower()}")
    # GYRFALCON_<NAME> exists for every option and is told once; other names are told where they are.
    foreign = [name for name in option.variables if not name.startswith("GYRFALCON_")]
    if foreign:
        notes.append(f"variable {' or '.join(foreign)}")
    return f"{option.help} [{', '.join(notes)}]" if notes else option.help


def _config_flag() -> inspect.Parameter:
    info = typer.Option(
        "--config",
        metavar="FILE",
        help=f"TOML file with settings. [default ./gyrfalcon.toml if there is one, variable {CONFIG_VARIABLE}]",
        show_default=False,
    )
    return _parameter("config", Annotated[Path | None, info])


def _refused_flag(name: str) -> inspect.Parameter:
    return _parameter(name, Annotated[bool | None, typer.Option(f"--{name.replace('_', '-')}", hidden=True)])


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
