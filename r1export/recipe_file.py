"""Read a recipe from its file: what it extends, overrides of the command line, and fields that were removed."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from r1export.errors import InputError, refused
from r1export.recipe import Recipe
from r1export.recipe_paths import find_recipe, resolve_fields, resolve_sources, shipped_recipes, sources


@dataclass(frozen=True)
class Retired:
    """A removed field, or a removed value of a field, and its replacement."""

    field: str
    value: str | None
    """None matches any value."""
    advice: str

    def __str__(self) -> str:
        return f"{self.field}" if self.value is None else f'{self.field} = "{self.value}"'

    def used_in(self, values: Mapping[str, Any]) -> bool:
        """Whether a recipe uses it."""
        section, _, name = self.field.partition(".")
        table = values.get(section)
        if not isinstance(table, dict) or name not in table:
            return False
        return self.value is None or self.value in (table[name] if isinstance(table[name], list) else [table[name]])


RETIRED = (
    Retired("train.keep", None, "use train.distill_weight"),
    Retired("pool.towers", "text", 'use "textual"'),
    Retired("pool.gate", "frequency", 'use "binary": weights from votes had no benefit'),
    Retired("train.orthogonality", "input", 'use "output": penalizing the input side had no benefit'),
)


def load_recipe(path: Path | str, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe: a file, or the name of one that comes with r1export.

    Each override is `section.field=value` with a TOML value; a bare word is a string.

    With `extends = "OTHER.toml"` at the top, a recipe overrides another one, whose path is relative to this file.

    >>> load_recipe("quickstart", ("train.iterations=50",)).train.iterations
    50

    Raises:
        InputError: the file is missing or not TOML, or has an unknown or removed key, a wrong type or an invalid value.
            The message names the key.
    """
    path = find_recipe(Path(path))
    try:
        values, folders = _read(path)
        for override in overrides:
            _set(values, override)
            _refuse_retired(values, f"--set {override}")
        resolve_fields(values, Path.cwd())
        resolve_sources(values, folders)
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path}: {_describe(error)}", "docs/recipe.md lists all fields") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply", "use tables of fields only") from None


def _read(path: Path, extended: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, Path]]:
    """The tables of a recipe with those that it extends, and the folder of the file that sets each source."""
    if path.resolve() in extended:
        raise InputError(f"{path}: extends itself", "remove the cycle in extends")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors on Windows write a byte order mark
    except FileNotFoundError:
        names = ", ".join(sorted(file.stem for file in shipped_recipes().glob("*.toml")))
        raise InputError(f"{path}: no such recipe", f"give a file, or one of {names}") from None
    except PermissionError as error:
        raise refused(error, str(path)) from error
    except (OSError, ValueError) as error:  # also for a number with thousands of digits
        raise InputError(f"{path}: invalid TOML: {error}", "fix the TOML syntax") from error
    _refuse_retired(values, str(path))
    if not isinstance(parent := values.pop("extends", ""), str):
        raise InputError(f"{path}: extends is {parent!r}, expected a file name", "set it to the path of one recipe")
    folder = path.resolve().parent
    resolve_fields(values, folder)
    if not parent:
        return values, sources(values, folder)
    inherited, folders = _read(path.parent / parent, (*extended, path.resolve()))
    return _over(inherited, values), folders | sources(values, folder)


def _refuse_retired(values: Mapping[str, Any], location: str) -> None:
    for retired in RETIRED:
        if retired.used_in(values):
            raise InputError(f"{location}: {retired} is no longer used", retired.advice)


def _over(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`values` updated with `changes`, table by table; lists are replaced as a whole."""
    merged = dict(values)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _over(merged[key], value) if both else value
    return merged


def _set(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override}", "expected section.field=value, for example train.iterations=50")
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except ValueError:
        value = text
    *parents, last = key.split(".")
    table: Any = values
    try:
        for parent in parents:
            table = table[int(parent)] if isinstance(table, list) else table.setdefault(parent, {})
        table[int(last) if isinstance(table, list) else last] = value
    except (ValueError, IndexError, TypeError, AttributeError):
        raise InputError(
            f"--set {override}: unknown key {key}", "expected section.field=value or tasks.0.field=value"
        ) from None


def _describe(error: ValidationError) -> str:
    first = error.errors()[0]
    location = ".".join(str(part) for part in first["loc"]) or "recipe"
    unknown = first["type"] == "extra_forbidden"
    shown = "" if unknown or isinstance(first["input"], dict) else f", found {first['input']!r:.200}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    message = "unknown key" if unknown else first["msg"].removeprefix("Value error, ")
    return f"{location}: {message}{shown}{more}"
