"""JSON read strictly and in bounded time and memory, with the place of every fault.

What two parsers could read differently is refused: duplicate keys, NaN, floats for integers, booleans for numbers,
lone surrogates, huge numbers, deep nesting, bytes after the end.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from r1export.errors import InputError

MAX_INTEGER = 2**53 - 1  # the largest that every JSON implementation holds exactly
REMEDY = "fetch the file again, or have it made again"
_DIGEST = re.compile(r"[0-9a-f]{64}")


def parse_json(data: bytes, place: str, limit: int) -> Fields:
    """The JSON object in `data`, at most `limit` bytes long; `place` names it in errors.

    Raises:
        InputError: not one strict JSON object in UTF-8.
    """
    if len(data) > limit:
        raise InputError(f"{place}: {len(data)} bytes, at most {limit} are read", REMEDY)
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=no_duplicates,
            parse_constant=_no_constant,
            parse_int=_integer,
            parse_float=_number,
        )
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not strict JSON: {str(error) or type(error).__name__}"[:300], REMEDY) from None
    return Fields(value, place)


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The members of a JSON object. Raises ValueError if two have the same name."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


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
    """One JSON object whose members are taken out one by one, each with its type; `done` refuses what is left."""

    def __init__(self, value: Any, place: str) -> None:
        if not isinstance(value, dict):
            raise wrong(place, value, "an object")
        self._rest = dict(value)
        self.place = place

    def __contains__(self, name: str) -> bool:
        return name in self._rest

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._rest))

    def take(self, name: str) -> Any:
        """The member as JSON gave it. Raises InputError if there is none."""
        if name not in self._rest:
            raise InputError(f"{self.place}.{name} is missing", REMEDY)
        return self._rest.pop(name)

    def integer(self, name: str, low: int = 0, high: int = MAX_INTEGER) -> int:
        """A whole number in low..high, written without point or exponent."""
        return whole(self.take(name), f"{self.place}.{name}", low, high)

    def number(self, name: str, low: float, high: float) -> float:
        """A number in low..high."""
        value = self.take(name)
        if type(value) not in (int, float) or not low <= value <= high:
            raise wrong(f"{self.place}.{name}", value, f"a number from {low:g} to {high:g}")
        return float(value)

    def text(self, name: str, pattern: re.Pattern[str]) -> str:
        """A string that matches `pattern` from end to end."""
        return matching(self.take(name), f"{self.place}.{name}", pattern)

    def digest(self, name: str) -> str:
        """A SHA-256 in lower-case hex."""
        return self.text(name, _DIGEST)

    def object(self, name: str) -> Fields:
        """A member that is itself an object."""
        return Fields(self.take(name), f"{self.place}.{name}")

    def array(self, name: str, limit: int) -> list[tuple[Any, str]]:
        """The items of an array, each with its place, at most `limit`."""
        return items(self.take(name), f"{self.place}.{name}", limit)

    def digests(self, name: str, key: re.Pattern[str], limit: int) -> dict[str, str]:
        """An object that maps names matching `key` to SHA-256 digests, at most `limit` of them."""
        fields = self.object(name)
        if len(fields._rest) > limit:
            raise wrong(fields.place, f"{len(fields._rest)} members", f"at most {limit}")
        return {matching(found, fields.place, key): fields.digest(found) for found in fields}

    def done(self) -> None:
        """Refuse members that nobody took: what is not understood could matter. Names that begin with `x-` may be ignored."""
        unknown = sorted(name for name in self._rest if not name.startswith("x-"))
        if unknown:
            raise InputError(f"{self.place}: unknown member {unknown[0]!r:.80}", "use an updater that knows it")


def items(value: Any, place: str, limit: int) -> list[tuple[Any, str]]:
    """The items of the array `value`, each with its place."""
    if not isinstance(value, list) or len(value) > limit:
        raise wrong(place, value, f"an array of at most {limit}")
    return [(item, f"{place}[{index}]") for index, item in enumerate(value)]


def whole(value: Any, place: str, low: int = 0, high: int = MAX_INTEGER) -> int:
    """`value` if it is a whole number in low..high; True and 1.0 are not."""
    if type(value) is not int or not low <= value <= high:
        raise wrong(place, value, f"a whole number from {low} to {high}")
    return value


def matching(value: Any, place: str, pattern: re.Pattern[str]) -> str:
    """`value` if it is a string that matches `pattern` from end to end."""
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise wrong(place, value, f"text like {pattern.pattern}")
    return value


def wrong(place: str, found: Any, expected: str) -> InputError:
    """The error for a member that is not what it has to be; `found` is cut, for it may be hostile."""
    if isinstance(found, list | dict):
        found = f"{type(found).__name__} of {len(found)}"
    return InputError(f"{place}: found {ascii(found)[:80]}, expected {expected}", REMEDY)


def places(values: list[tuple[Any, str]]) -> Iterator[Fields]:
    """Each item of an array as an object."""
    for value, place in values:
        yield Fields(value, place)
