"""A strict JSON parser with bounded time and memory, and the location of every error.

It rejects what two parsers could read differently: duplicate keys, NaN, floats for integers, booleans for numbers, lone
surrogates, huge numbers, deep nesting, trailing bytes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from r1export.errors import InputError
from r1export.update.names import DIGEST

MAX_INTEGER = 2**53 - 1  # the largest integer that every JSON implementation represents exactly
REMEDY = "download the file again, or rebuild it"


def parse_json(data: bytes, location: str, limit: int) -> Fields:
    """The JSON object in `data`, at most `limit` bytes long; `location` names it in errors.

    Raises:
        InputError: not one strict JSON object in UTF-8.
    """
    if len(data) > limit:
        raise InputError(f"{location}: {len(data)} bytes, expected at most {limit}", REMEDY)
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=no_duplicates,
            parse_constant=_no_constant,
            parse_int=_integer,
            parse_float=_number,
        )
        if b"\\u" in data:  # the only way to encode a lone surrogate
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"{location}: not strict JSON: {str(error) or type(error).__name__}"[:300], REMEDY) from None
    return Fields(value, location)


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The members of a JSON object. Raises ValueError if two have the same name."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("duplicate key")
    return members


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _integer(text: str) -> int:
    if len(text) > 17:
        raise ValueError("an integer of more than 16 digits")
    if text == "-0":
        raise ValueError("-0, which some parsers read as 0 and others as a float")
    return int(text)


def _number(text: str) -> float:
    if len(text) > 40 or not math.isfinite(value := float(text)):
        raise ValueError("a number that is too large or too long")
    return value


class Fields:
    """One JSON object whose members are read one by one, each with its type; `done` rejects the remaining ones."""

    def __init__(self, value: Any, location: str) -> None:
        if not isinstance(value, dict):
            raise wrong(location, value, "an object")
        self._rest = dict(value)
        self.location = location

    def __contains__(self, name: str) -> bool:
        return name in self._rest

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._rest))

    def take(self, name: str) -> Any:
        """The member as JSON gave it. Raises InputError if there is none."""
        if name not in self._rest:
            raise InputError(f"{self.location}.{name} is missing", REMEDY)
        return self._rest.pop(name)

    def integer(self, name: str, low: int = 0, high: int = MAX_INTEGER) -> int:
        """A whole number in low..high, written without point or exponent."""
        return whole(self.take(name), f"{self.location}.{name}", low, high)

    def number(self, name: str, low: float, high: float) -> float:
        """A number in low..high."""
        return number(self.take(name), f"{self.location}.{name}", low, high)

    def number_or_null(self, name: str, low: float, high: float) -> float | None:
        """A number in low..high, or None for null."""
        if name in self._rest and self._rest[name] is None:
            del self._rest[name]
            return None
        return self.number(name, low, high)

    def flag(self, name: str) -> bool:
        """true or false."""
        value = self.take(name)
        if type(value) is not bool:
            raise wrong(f"{self.location}.{name}", value, "true or false")
        return value

    def text(self, name: str, pattern: re.Pattern[str]) -> str:
        """A string that matches `pattern` from end to end."""
        return matching(self.take(name), f"{self.location}.{name}", pattern)

    def digest(self, name: str) -> str:
        """A SHA-256 in lower-case hex."""
        return self.text(name, DIGEST)

    def object(self, name: str) -> Fields:
        """A member that is itself an object."""
        return Fields(self.take(name), f"{self.location}.{name}")

    def array(self, name: str, limit: int) -> list[tuple[Any, str]]:
        """The items of an array, each with its location, at most `limit`."""
        return items(self.take(name), f"{self.location}.{name}", limit)

    def records(self, name: str, limit: int) -> list[Fields]:
        """The items of an array of objects, at most `limit`."""
        return [Fields(value, location) for value, location in self.array(name, limit)]

    def digests(self, name: str, key: re.Pattern[str], limit: int) -> dict[str, str]:
        """An object that maps names matching `key` to SHA-256 digests, at most `limit` of them."""
        return self.texts(name, key, DIGEST, limit)

    def texts(self, name: str, key: re.Pattern[str], value: re.Pattern[str], limit: int) -> dict[str, str]:
        """An object that maps names matching `key` to texts matching `value`, at most `limit` of them."""
        fields = self.object(name)
        return {member: fields.text(member, value) for member in fields.names(key, limit)}

    def objects(self, name: str, key: re.Pattern[str], limit: int) -> dict[str, Fields]:
        """An object that maps names matching `key` to objects, at most `limit` of them."""
        fields = self.object(name)
        return {member: fields.object(member) for member in fields.names(key, limit)}

    def names(self, pattern: re.Pattern[str], limit: int) -> list[str]:
        """The names of all members that were not taken yet, at most `limit`, each matching `pattern`."""
        if len(self._rest) > limit:
            raise wrong(self.location, f"{len(self._rest)} members", f"at most {limit}")
        return [matching(name, self.location, pattern) for name in self._rest]

    def done(self, *, extensions: bool = True) -> None:
        """Refuse members that nobody took: what is not understood could matter.

        With `extensions`, members whose names begin with `x-` may be ignored.
        """
        unknown = sorted(name for name in self._rest if not (extensions and name.startswith("x-")))
        if unknown:
            raise InputError(f"{self.location}: unknown key {unknown[0]!r:.80}", "use an updater that supports it")


def items(value: Any, location: str, limit: int) -> list[tuple[Any, str]]:
    """The items of the array `value`, each with its location."""
    if not isinstance(value, list) or len(value) > limit:
        raise wrong(location, value, f"an array of at most {limit}")
    return [(item, f"{location}[{index}]") for index, item in enumerate(value)]


def number(value: Any, location: str, low: float, high: float) -> float:
    """`value` if it is a number in low..high; True is not."""
    if type(value) not in (int, float) or not low <= value <= high:
        raise wrong(location, value, f"a number from {low:g} to {high:g}")
    return float(value)


def whole(value: Any, location: str, low: int = 0, high: int = MAX_INTEGER) -> int:
    """`value` if it is a whole number in low..high; True and 1.0 are not."""
    if type(value) is not int or not low <= value <= high:
        raise wrong(location, value, f"a whole number from {low} to {high}")
    return value


def matching(value: Any, location: str, pattern: re.Pattern[str]) -> str:
    """`value` if it is a string that matches `pattern` from end to end."""
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise wrong(location, value, f"text like {pattern.pattern}")
    return value


def wrong(location: str, found: Any, expected: str) -> InputError:
    """The error for a member that is not what it has to be; `found` is cut, for it may be hostile."""
    if isinstance(found, (list, dict)):
        found = f"{type(found).__name__} of {len(found)}"
    return InputError(f"{location}: found {ascii(found)[:80]}, expected {expected}", REMEDY)
