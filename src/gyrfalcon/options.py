"""A setting's declaration: how each source spells it and what it may hold.

A `Kind` reads one value, from the text of a flag or a variable as well as from a TOML value, and says in words
what it accepts. `config.Settings` declares each of its fields with one `Option`.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gyrfalcon.errors import SettingsError

_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})
_BYTES_PER_UNIT = {"": 1, **{unit: 1000**power for power, unit in enumerate(("k", "m", "g", "t"), start=1)}}
_BYTES_PER_UNIT |= {f"{unit}i": 1024**power for power, unit in enumerate(("k", "m", "g", "t"), start=1)}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Kind:
    """What a setting may hold.

    read: makes the value from a flag's or variable's text, from a TOML value, or from a value of its own type;
    raises ValueError when it may not hold that. allowed: ends the sentence "`x` is not ...". metavar: stands for
    the value in --help; empty for a switch, which has none.
    """

    read: Callable[[object], object]
    allowed: str
    metavar: str
    is_list: bool = False

    @property
    def is_switch(self) -> bool:
        return not self.metavar


@dataclass(frozen=True, slots=True)
class Option:
    """One field of the settings and its spelling in every source.

    name: the field's, and the TOML key. flags: the first is the one messages name; none where only variables can
    give the value. variables: in order of precedence. group: heading in --help. secret: the value is never shown.
    positional: the metavar of the argument that can give the value too.
    """

    name: str
    kind: Kind
    default: object
    help: str
    group: str
    flags: tuple[str, ...]
    variables: tuple[str, ...]
    secret: bool = False
    positional: str | None = None

    @property
    def flag(self) -> str:
        return self.flags[0]

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.flags[0] if self.flags else self.variables[0]

    def read(self, raw: object, origin: str) -> object:
        """The value that `raw` spells. Raises SettingsError that names the option, the value and its origin."""
        try:
            return self.kind.read(raw)
        except (ValueError, OverflowError):
            raise SettingsError(self.label, f"{self.quote(raw, origin)} is not {self.kind.allowed}") from None

    def quote(self, raw: object, origin: str) -> str:
        """The value and where it came from, on one line, for a message; a secret stays out of sight."""
        text = ",".join(map(str, raw)) if isinstance(raw, (list, tuple)) else str(raw)
        if isinstance(raw, bool):
            text = text.lower()
        if not text.isprintable():
            text = ascii(text)
        return f"{'the hidden value' if self.secret else f'`{text}`'} ({origin})"


def text() -> Kind:
    """A line of text that is not empty."""
    return Kind(_read_text, "a line of text", "TEXT")


def path() -> Kind:
    """A file or folder; need not exist yet. A leading `~` is the home folder."""
    return Kind(lambda raw: Path(_read_text(str(raw) if isinstance(raw, Path) else raw)).expanduser(), "a path", "PATH")


def chat_template() -> Kind:
    """A chat template's own text, told by its braces or line breaks, or the path of a file that holds one."""

    def read(raw: object) -> str | Path:
        if isinstance(raw, Path):
            return raw
        if isinstance(raw, str) and any(mark in raw for mark in "{}\n"):
            return raw
        return Path(_read_text(raw)).expanduser()

    return Kind(read, "a chat template or the path of one", "TEMPLATE|PATH")


def host() -> Kind:
    """An address to listen on: an IP address or a host name, without scheme or port."""
    return Kind(_read_host, "an IP address or a host name without scheme and port", "HOST")


def route() -> Kind:
    """The path of a URL."""

    def read(raw: object) -> str:
        value = _read_text(raw)
        if re.fullmatch(r"(?:/[\w.~:@!$&'()*+,;=-]+)+", value, re.ASCII) is None:
            raise ValueError
        return value

    return Kind(read, "a path such as /predict", "PATH")


def switch() -> Kind:
    """On or off."""
    return Kind(_read_switch, "true or false", "")


def one_of(*names: str, synonyms: dict[str, str] | None = None) -> Kind:
    """One of the names, in any case; a synonym stands for one of them."""
    meanings = {name: name for name in names} | (synonyms or {})

    def read(raw: object) -> str:
        found = meanings.get(_read_text(raw).lower())
        if found is None:
            raise ValueError
        return found

    return Kind(read, f"one of {', '.join(names)}", "|".join(names))


def whole(low: int, high: int | None = None) -> Kind:
    """A whole number from low to high, both included."""

    def read(raw: object) -> int:
        value = _read_whole(raw)
        if value < low or (high is not None and value > high):
            raise ValueError
        return value

    return Kind(read, f"a whole number {_range(low, high)}", "NUMBER")


def power_of_two(low: int, high: int) -> Kind:
    """A power of two from low to high, both included."""

    def read(raw: object) -> int:
        value = _read_whole(raw)
        if not low <= value <= high or value.bit_count() != 1:
            raise ValueError
        return value

    return Kind(read, f"a power of two {_range(low, high)}", "NUMBER")


def number(low: float, high: float | None = None, *, above: bool = False, below: bool = False) -> Kind:
    """A finite number from low to high; above and below exclude that end of the range."""

    def read(raw: object) -> float:
        if isinstance(raw, bool) or not isinstance(raw, (int, float, str)):
            raise ValueError
        value = float(raw)
        too_low = value <= low if above else value < low
        too_high = high is not None and (value >= high if below else value > high)
        if not math.isfinite(value) or too_low or too_high:
            raise ValueError
        return value

    span = f"above {low:g}" if above else f"at least {low:g}"
    if high is not None:
        span += f" and {'below' if below else 'at most'} {high:g}"
    return Kind(read, f"a number {span}", "NUMBER")


def size() -> Kind:
    """A number of bytes above zero: `2GiB`, `500MB`, `1073741824`."""

    def read(raw: object) -> int:
        if isinstance(raw, int) and not isinstance(raw, bool):
            value = raw
        else:
            match = _SIZE.fullmatch(_read_text(raw).lower())
            # A bare "i" or "1ib" is no unit.
            if match is None or match[2] not in _BYTES_PER_UNIT:
                raise ValueError
            value = int(float(match[1]) * _BYTES_PER_UNIT[match[2]])
        if value < 1:
            raise ValueError
        return value

    return Kind(read, "a size in bytes such as 2GiB or 500MB", "SIZE")


def listing(item: Kind | None = None) -> Kind:
    """Several values, texts if not said: a repeated flag, a TOML array, or one text with commas between them."""
    read_item = _read_text if item is None else item.read

    def read(raw: object) -> tuple[object, ...]:
        parts = [raw] if isinstance(raw, str) else raw
        if not isinstance(parts, (list, tuple)):
            raise ValueError
        return tuple(read_item(piece) for part in parts for piece in _read_text(part).split(","))

    if item is None:
        return Kind(read, "a list of texts, none of them empty", "TEXT", is_list=True)
    return Kind(read, f"a list in which each is {item.allowed}", item.metavar, is_list=True)


def optional(kind: Kind, *words: str) -> Kind:
    """What `kind` holds, or None, which each of the words spells."""

    def read(raw: object) -> object:
        if raw is None or (not isinstance(raw, bool) and str(raw).strip().lower() in words):
            return None
        return kind.read(raw)

    spelling = " or ".join(f"`{word}`" for word in words)
    return Kind(read, f"{kind.allowed}, or {spelling}" if words else kind.allowed, kind.metavar, kind.is_list)


def is_ip_address(text: str) -> bool:
    """Whether the text is an IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _range(low: int, high: int | None) -> str:
    return f"from {low} up" if high is None else f"from {low} to {high}"


def _read_text(raw: object) -> str:
    if not isinstance(raw, str) or not raw.strip() or not raw.strip().isprintable():
        raise ValueError
    return raw.strip()


def _read_host(raw: object) -> str:
    name = _read_text(raw)
    if not is_ip_address(name) and re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252})", name) is None:
        raise ValueError
    return name


def _read_switch(raw: object) -> bool:
    if isinstance(raw, bool):
        return raw
    word = _read_text(raw).lower()
    if word not in _TRUE | _FALSE:
        raise ValueError
    return word in _TRUE


def _read_whole(raw: object) -> int:
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    digits = _read_text(raw)
    # int() alone would take "1_000", "٣" and a text of a million digits.
    if re.fullmatch(r"[+-]?\d{1,20}", digits, re.ASCII) is None:
        raise ValueError
    return int(digits)
