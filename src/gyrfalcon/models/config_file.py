"""Typed reading of a checkpoint's config.json: every wrong value is an error that names file, key and value."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

from gyrfalcon.errors import ModelLoadError

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


class ConfigFile:
    """The members of a JSON object, read under any of several spellings; null counts as absent."""

    def __init__(self, path: Path, members: dict[str, Json]) -> None:
        self.path = path
        self._members = members

    @classmethod
    def read(cls, path: Path) -> ConfigFile:
        """Raises ModelLoadError when the file is missing, is not JSON, or holds no object."""
        try:
            members = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise ModelLoadError(f"{path}: no such file; a checkpoint folder needs config.json") from None
        except OSError as error:
            raise ModelLoadError(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise ModelLoadError(f"{path}: is not valid JSON: {error}") from None
        if not isinstance(members, dict):
            raise ModelLoadError(f"{path}: holds {_shown(members)}, expected a JSON object")
        return cls(path, members)

    def error(self, key: str, value: object, expected: str) -> ModelLoadError:
        """The error for a member whose value cannot be served."""
        return ModelLoadError(f"{self.path}: `{key}` is {_shown(value)}; {expected}")

    def find(self, *keys: str) -> tuple[str, Json]:
        """The first of `keys` that is present, with its value; the first key and None when none is."""
        for key in keys:
            value = self._members.get(key)
            if value is not None:
                return key, value
        return keys[0], None

    def integer(self, *keys: str, default: int | None = None, limit: int = 1 << 31) -> int:
        """A whole number from 1 to `limit`; without a default, an error when absent."""
        expected = f"expected a whole number from 1 to {limit}"
        key, value = self.find(*keys)
        if value is None:
            value = default
        if value is None:
            raise ModelLoadError(f"{self.path}: `{key}` is missing; {expected}")
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise self.error(key, value, expected)
        return value

    def number(self, *keys: str, default: float | None = None) -> float:
        """A finite number above 0; without a default, an error when absent."""
        key, value = self.find(*keys)
        if value is None:
            value = default
        if value is None:
            raise ModelLoadError(f"{self.path}: `{key}` is missing; expected a number above 0")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.error(key, value, "expected a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._members.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, value, "expected true or false")
        return value

    def text(self, *keys: str, default: str) -> str:
        key, value = self.find(*keys)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(key, value, "expected a string")
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        """Token ids given as one number or a list of them; empty when absent."""
        value = self._members.get(key)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        ids: list[int] = []
        for entry in listed:
            if isinstance(entry, bool) or not isinstance(entry, int) or entry < 0:
                raise self.error(key, value, "expected a token id, or a list of them")
            ids.append(entry)
        return tuple(ids)

    def section(self, *keys: str) -> ConfigFile | None:
        """A nested object, to be read in the same way; None when absent."""
        key, value = self.find(*keys)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, value, "expected a JSON object")
        return ConfigFile(self.path, value)

    def keys(self) -> tuple[str, ...]:
        """The members' names, as the file has them."""
        return tuple(self._members)

    def strings(self) -> Iterator[tuple[str, str]]:
        """All members, which must be strings."""
        for key, value in self._members.items():
            if not isinstance(value, str):
                raise self.error(key, value, "expected a string")
            yield key, value


def _shown(value: object) -> str:
    """A value as JSON, short enough for a message."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
