"""Where recipes are, and what their paths are relative to.

A recipe that comes with r1export has a name: `quickstart` is recipes/quickstart.toml. Relative paths in a recipe are
relative to the recipe file; on the command line, to the current folder. If the recipe sets `data.root`, relative paths in
sources are relative to that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FIELDS = (("base", "weights"), ("base", "config"), ("base", "tokenizer"), ("data", "root"))
MODEL_FOLDER = "local-dir"  # the scheme of a base.model in a folder
SOURCES = ("folder", "npz", "hf")  # sources whose address is a path; for hf it may be a name instead
Tables = dict[str, Any]  # a parsed recipe before validation
PACKAGE = Path(__file__).parent


def shipped_recipes() -> Path:
    """The folder of the recipes that come with r1export: in a wheel inside the package, in a checkout next to it."""
    inside = PACKAGE / "recipes"
    return inside if inside.is_dir() else PACKAGE.parent / "recipes"


def find_recipe(name: Path) -> Path:
    """`name` itself, or the shipped recipe of that name if there is no such file."""
    shipped = shipped_recipes() / name.with_suffix(".toml")
    return shipped if not name.exists() and name == Path(name.stem) and shipped.is_file() else name


def resolve_fields(values: Tables, folder: Path) -> None:
    """Make the paths of `base` and `data` absolute, in place; relative ones are resolved against `folder`."""
    for section, name in FIELDS:
        table = values.get(section)
        if isinstance(table, dict) and isinstance(value := table.get(name), str) and value:
            table[name] = _absolute(value, folder)
    base = values.get("base")
    if isinstance(base, dict) and isinstance(base.get("model"), str):
        base["model"] = _resolve_address(base["model"], (MODEL_FOLDER,), folder)


def resolve_sources(values: Tables, folders: Mapping[str, Path]) -> None:
    """Make the paths in sources absolute, in place, unless `data.root` is set; `folders` has the folder of each source."""
    data = values.get("data")
    if isinstance(data, dict) and data.get("root"):
        return
    for table in tasks(values):
        source = table.get("source")
        if isinstance(source, str):
            table["source"] = _resolve_address(source, SOURCES, folders.get(source, Path.cwd()))


def tasks(values: Mapping[str, Any]) -> Iterator[Tables]:
    """The tables of the tasks and of the probe."""
    listed = values.get("tasks")
    for table in (*(listed if isinstance(listed, list) else ()), values.get("probe")):
        if isinstance(table, dict):
            yield table


def sources(values: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """The folder of each source, if all of them are in the same file."""
    return {str(table.get("source")): folder for table in tasks(values)}


def _resolve_address(text: str, schemes: tuple[str, ...], folder: Path) -> str:
    scheme, colon, address = text.partition(":")
    if scheme not in schemes or not address or (scheme == "hf" and not (folder / address.partition(":")[0]).is_dir()):
        return text
    return f"{scheme}{colon}{_absolute(address, folder)}"


def _absolute(path: str, folder: Path) -> str:
    """`path` resolved against `folder`. A leading `~` or variable is kept: it is expanded when the path is used."""
    return path if path.startswith(("~", "$")) else str(folder / path)
