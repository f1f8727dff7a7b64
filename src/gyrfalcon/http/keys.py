"""API keys: who holds one, what each may use, and reading them again while the server runs.

A file of keys has a line each: a name, the key or `sha256:` and its digest in hexadecimal, and what differs for this
key from the limits of all:

    # name   key                       limits of its own
    team-a   sha256:2bb80d53...        requests-per-minute=600  max-concurrent-requests=none
    team-b   a-key-in-plain-text

Only digests are kept; no message holds a key.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gyrfalcon.errors import SettingsError

DIGEST_MARK = "sha256:"
MAX_FILE_BYTES = 2**24
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,99}")
_LIMITS = {
    "max-concurrent-requests": "max_concurrent_requests",
    "requests-per-minute": "requests_per_minute",
    "max-queued-tokens": "max_queued_tokens",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLimits:
    """What the holder of a key may use; None is no limit of the key's own."""

    max_concurrent_requests: int | None = None
    requests_per_minute: int | None = None
    max_queued_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One accepted key. digest: SHA-256 of the key."""

    name: str
    digest: bytes
    limits: KeyLimits

    @property
    def cache_salt(self) -> str:
        """What this key's prefixes are cached under: the same for no two keys."""
        return hashlib.sha256(b"gyrfalcon cache of\0" + self.digest).hexdigest()


class KeyStore:
    """The accepted keys: those of the settings, and those of a file, which may be read again at any time."""

    def __init__(self, keys: Sequence[str] = (), *, file: Path | None = None, limits: KeyLimits | None = None) -> None:
        """limits: of every key that has none of its own. Raises SettingsError where the file cannot be used."""
        self._limits = limits or KeyLimits()
        self._given = [
            ApiKey(f"key-{number}", _digest(key), self._limits) for number, key in enumerate(dict.fromkeys(keys), 1)
        ]
        self._file = file
        self._keys = self._read()

    @property
    def is_required(self) -> bool:
        """Whether requests must carry a key; a file without keys leaves none that would do."""
        return bool(self._given) or self._file is not None

    @property
    def file(self) -> Path | None:
        return self._file

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, presented: str) -> ApiKey | None:
        """The key that this is, compared in the same time whichever it is; case matters."""
        digest = _digest(presented)
        found = None
        for key in self._keys:  # all of them, whichever matches
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found

    def reload(self) -> None:
        """Read the file again. Raises SettingsError where it cannot be used, and keeps what was."""
        self._keys = self._read()

    def _read(self) -> list[ApiKey]:
        keys = list(self._given)
        if self._file is not None:
            keys += _read_file(self._file, self._limits)
        names, digests = set[str](), set[bytes]()
        for key in keys:
            if key.name in names or key.digest in digests:
                what = "name is" if key.name in names else "key is"
                raise SettingsError("--api-key-file", f"`{self._file}`: the {what} given twice: `{key.name}`")
            names.add(key.name)
            digests.add(key.digest)
        return keys


def _read_file(path: Path, limits: KeyLimits) -> Iterator[ApiKey]:
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise SettingsError("--api-key-file", f"`{path}` is larger than {MAX_FILE_BYTES} bytes")
        lines = content.decode("utf-8").splitlines()
    except OSError as error:
        raise SettingsError("--api-key-file", f"`{path}` cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError:
        raise SettingsError("--api-key-file", f"`{path}` is not UTF-8 text") from None
    for number, line in enumerate(lines, 1):
        fields = line.split()
        if fields and not fields[0].startswith("#"):
            yield _parse(fields, limits, f"`{path}` line {number}")


def _parse(fields: list[str], limits: KeyLimits, where: str) -> ApiKey:
    """A line's key. where: for messages, which must not quote what may be a key."""
    if len(fields) < 2:
        raise SettingsError("--api-key-file", f"{where}: expected a name and a key or `{DIGEST_MARK}` and its digest")
    name, key, *overrides = fields
    if not _NAME.fullmatch(name):
        raise SettingsError("--api-key-file", f"{where}: a name has letters, digits and `_.@-`, 100 at most")
    digest = _digest(key)
    if key.lower().startswith(DIGEST_MARK):
        try:
            digest = bytes.fromhex(key[len(DIGEST_MARK) :])
        except ValueError:
            digest = b""
        if len(digest) != hashlib.sha256().digest_size:
            raise SettingsError("--api-key-file", f"{where}: expected 64 hexadecimal digits after `{DIGEST_MARK}`")
    for override in overrides:
        option, _, value = override.partition("=")
        if option not in _LIMITS:
            raise SettingsError("--api-key-file", f"{where}: a limit is one of {', '.join(_LIMITS)}, each with =NUMBER")
        if value != "none" and not re.fullmatch(r"[1-9]\d{0,11}", value, re.ASCII):
            raise SettingsError("--api-key-file", f"{where}: {option} is not a whole number from 1 up, or none")
        limits = replace(limits, **{_LIMITS[option]: None if value == "none" else int(value)})
    return ApiKey(name, digest, limits)


def _digest(key: str) -> bytes:
    # Header bytes reach us as Latin-1 text; keys that hold other characters are sent as UTF-8.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
