"""Options of another server's command line, and what becomes of them here: honoured, without effect, or refused.

A command that stands in for such a server declares them in one table, from which its flags, its lines at start and
its page in docs/ are made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from gyrfalcon import config
from gyrfalcon.errors import SettingsError
from gyrfalcon.options import Kind, Option


class Fate(Enum):
    """What becomes of an option; the values are headings of --help."""

    HONOURED = "Honoured"
    NO_EFFECT = "Without effect: a line at start says why"
    REFUSED = "Refused: the server does not start"


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignOption:
    """One flag of another server with its variables, or a variable that has no flag.

    option: its spelling and kind; `default` is that server's where it differs from what `serve` does. field: the
    setting it gives, None where something else reads it. quiet: values that ask for nothing that is not so anyway;
    they pass without a line, or unrefused. remedy: what to do instead; for a refused one.
    """

    option: Option
    fate: Fate
    field: str | None = None
    quiet: tuple[object, ...] = ()
    remedy: str = ""

    @property
    def name(self) -> str:
        return self.option.name

    @property
    def reason(self) -> str:
        """Why it has no effect or is refused; what is particular about one that is honoured."""
        return self.option.help


@dataclass(frozen=True, slots=True)
class Given:
    """An option that was given: its text, where that came from, and what it spells."""

    row: ForeignOption
    raw: object = dataclasses.field(repr=False)  # may be a secret
    origin: str
    value: object = dataclasses.field(repr=False)

    @property
    def is_flag(self) -> bool:
        return self.origin == FLAG

    @property
    def is_quiet(self) -> bool:
        return self.value in self.row.quiet

    def no_effect(self, reason: str = "") -> str:
        """The line that says so; the row's own reason if none is given."""
        quoted = self.row.option.quote(self.raw, self.origin)
        return f"{self.row.option.label}: {quoted} has no effect and can be left out: {reason or self.row.reason}"

    def refusal(self) -> SettingsError:
        quoted = self.row.option.quote(self.raw, self.origin)
        return SettingsError(self.row.option.label, f"{quoted} is refused: {self.row.reason}; {self.row.remedy}")


FLAG = "flag"


def find_options(
    rows: Iterable[ForeignOption], flags: Mapping[str, object], environ: Mapping[str, str]
) -> dict[str, Given]:
    """The options that were given, by name; the command line wins over the environment.

    flags: texts from the command line by option name; None counts as not given. An empty variable counts as unset,
    unless it is a secret that would be honoured. Raises SettingsError for a value that the option may not hold.
    """
    found = {}
    for row in rows:
        for raw, origin in sources(row, flags, environ):
            found[row.name] = Given(row, raw, origin, row.option.read(raw, origin))
            break
    return found


def judge(given: Mapping[str, Given]) -> Iterator[str]:
    """A line for each option without effect. Raises SettingsError for one that is refused."""
    for each in given.values():
        if each.row.fate is Fate.HONOURED or each.is_quiet:
            continue
        if each.row.fate is Fate.REFUSED:
            raise each.refusal()
        yield each.no_effect()


def sources(
    row: ForeignOption, flags: Mapping[str, object], environ: Mapping[str, str]
) -> Iterator[tuple[object, str]]:
    """What gives the option, with where it comes from; the first wins. Nothing for a row that something else reads."""
    if row.fate is Fate.HONOURED and row.field is None:  # not a setting: --env, or the Hub library's variables
        return
    given = flags.get(row.name)
    if given is not None:
        yield given, FLAG
    for variable in row.option.variables:
        raw = environ.get(variable)
        # Serving without a key because it was lost on the way would be worse than not serving.
        is_lost_secret = raw == "" and row.option.secret and row.fate is Fate.HONOURED
        if raw is not None and (raw or is_lost_secret) and not config.is_platforms_own(variable, raw):
            yield raw, f"environment variable {variable}"


def declare(
    spelling: str,
    fate: Fate,
    kind: Kind,
    help: str,
    *,
    field: str | None = None,
    default: object = None,
    quiet: tuple[object, ...] = (),
    remedy: str = "",
    platform: tuple[str, ...] = (),
    secret: bool = False,
    has_variable: bool = True,
) -> ForeignOption:
    """A row from its flags ("--port -p") or, for a variable without a flag, that variable's name.

    platform: variables by which a platform gives it; they win over the plain one, as in the images for it.
    """
    flags = tuple(spelling.split()) if spelling.startswith("-") else ()
    variable = flags[0].removeprefix("--").replace("-", "_").upper() if flags else spelling
    variables = (*platform, variable) if has_variable else ()
    option = Option(variable.lower(), kind, default, help, fate.value, flags, variables, secret)
    return ForeignOption(option=option, fate=fate, field=field, quiet=quiet, remedy=remedy)


_SETTINGS = {option.name: option for option in config.OPTIONS}


def honoured(
    spelling: str,
    field: str,
    *,
    note: str = "",
    default: object = None,
    kind: Kind | None = None,
    quiet: tuple[object, ...] = (),
    platform: tuple[str, ...] = (),
    has_variable: bool = True,
) -> ForeignOption:
    """A row that gives a setting, and takes kind, help and default from it where it has none of its own."""
    setting = _SETTINGS[field]
    return declare(
        spelling,
        Fate.HONOURED,
        kind or setting.kind,
        note or setting.help,
        field=field,
        default=setting.default if default is None else default,
        quiet=quiet,
        platform=platform,
        secret=setting.secret,
        has_variable=has_variable,
    )


def no_effect(
    spelling: str,
    kind: Kind,
    reason: str,
    *quiet: object,
    platform: tuple[str, ...] = (),
    secret: bool = False,
    has_variable: bool = True,
) -> ForeignOption:
    """A row that is accepted, and a line says why nothing follows unless the value is one of `quiet`."""
    return declare(
        spelling,
        Fate.NO_EFFECT,
        kind,
        reason,
        quiet=quiet,
        platform=platform,
        secret=secret,
        has_variable=has_variable,
    )


def refused(
    spelling: str,
    kind: Kind,
    reason: str,
    *quiet: object,
    remedy: str = "leave it out",
    platform: tuple[str, ...] = (),
    has_variable: bool = True,
) -> ForeignOption:
    """A row with which the server does not start unless the value is one of `quiet`."""
    return declare(
        spelling, Fate.REFUSED, kind, reason, quiet=quiet, remedy=remedy, platform=platform, has_variable=has_variable
    )
