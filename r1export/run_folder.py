"""A run on disk: where everything lies, and how far the run has come."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1export.errors import InputError, refused
from r1export.recipe import Recipe, load_recipe
from r1export.update.atomic_io import write_file, write_json
from r1export.update.factors import ExpertUpdate


@dataclass(frozen=True)
class Exports:
    """The graphs and the releases of a run in one precision."""

    path: Path

    @property
    def graphs(self) -> Path:
        return self.path / "graphs"

    def release(self, number: int, name: str) -> Path:
        """Folder of the release after task `number`; 0 is the base."""
        return self.path / "releases" / f"{number:02d}-{name}"

    def releases(self, recipe: Recipe) -> list[Path]:
        """All releases, the base first, whether they exist yet or not."""
        return [self.release(i, name) for i, name in enumerate(("base", *(task.name for task in recipe.stream)))]


@dataclass(frozen=True)
class RunFolder(Exports):
    """Paths inside RUN. Whether a step is done is read from the files themselves, which appear whole or not at all.

    RUN itself holds the exports in fp32, RUN/variants/PRECISION the others.
    """

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.toml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.json"

    def exports(self, precision: str = "fp32") -> Exports:
        """The graphs and releases in one precision."""
        return self if precision == "fp32" else Exports(self.path / "variants" / precision)

    def recipe(self) -> Recipe:
        """Raises InputError if this is not a run."""
        if not self.recipe_file.exists():
            raise InputError(
                f"{self.path}: not a run, it has no recipe.toml",
                "give the --out folder of r1export run, or a release folder",
            )
        return load_recipe(self.recipe_file)

    def task(self, number: int, name: str) -> Path:
        """Folder of task `number` (from 1)."""
        return self.path / "tasks" / f"{number:02d}-{name}"

    def updates(self, recipe: Recipe) -> list[ExpertUpdate]:
        """The factors of all tasks learned so far, in order."""
        files = [self.task(i, task.name) / "factors.safetensors" for i, task in enumerate(recipe.stream, 1)]
        return [ExpertUpdate.read(file) for file in files if file.exists()]

    def keep_gaps(self, number: int, name: str, gaps: Mapping[str, object]) -> None:
        """Put G1 to G3 of a task, which `verify` measures, beside what training wrote into its metrics.json."""
        path = self.task(number, name) / "metrics.json"
        before = read_json(path, "delete the file and verify again") if path.exists() else {}
        write_json(path, before | {"gaps": gaps})

    def base(self) -> dict[str, Any]:
        """Name, digest and licence of the base model. Raises InputError if the run was not started, or run.json is damaged."""
        remedy = "train the run first: r1export train, or start anew with --overwrite"
        return read_json(self.path / "run.json", remedy, ("base.name", "base.sha256"))["base"]

    def metrics(self) -> dict[str, Any]:
        """Raises InputError if the run has not been trained, or metrics.json is damaged."""
        holds = ("tasks", "zero_shot", "zero_shot_avg", "accuracy", "probe")
        return read_json(self.metrics_file, "train the run first: r1export train", holds)


def read_json(path: Path, remedy: str, holds: Sequence[str] = ()) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError with `remedy` if it is missing, damaged, or lacks one of `holds`, as in `a.b`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", remedy) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged: {error}", remedy) from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: damaged: found {found!r:.80}, expected an object", remedy)
    if missing := [name for name in holds if not _has(found, name)]:
        raise InputError(f"{path}: damaged: it lacks {', '.join(missing)}", remedy)
    return found


def _has(value: Any, name: str) -> bool:
    """Whether there is a member `a.b` in objects of objects."""
    first, _, rest = name.partition(".")
    return isinstance(value, dict) and first in value and (not rest or _has(value[first], rest))


def check_run(path: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Look whether `open_run` may go ahead, without touching anything.

    Raises:
        InputError: the folder is not empty and neither was asked for, it holds another recipe, or it is no run at all.
    """
    run = RunFolder(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path.is_dir() and run.recipe_file.exists()):
        raise InputError(f"{path} is not empty and not a run", "choose another --out; nothing was touched")
    if not (resume or overwrite):
        raise InputError(f"{path} already holds a run", "go on with --resume, or start anew with --overwrite")
    if resume and not overwrite and run.recipe() != recipe:
        raise InputError(
            f"{path} holds a run of another recipe: {_difference(run.recipe(), recipe)}",
            "choose another --out, or --overwrite",
        )


def open_run(path: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> RunFolder:
    """A new run, or the one that is there: `resume` goes on with it, `overwrite` deletes it first.

    Raises InputError as `check_run` does, Unsupported if the disk is full or the folder may not be written.
    """
    check_run(path, recipe, resume=resume, overwrite=overwrite)
    run = RunFolder(path)
    try:
        if overwrite and run.recipe_file.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
        if not run.recipe_file.exists():
            write_file(run.recipe_file, recipe.dumps().encode())
    except OSError as error:
        raise refused(error, f"{path} could not be written") from error
    return run


def _difference(one: Recipe, other: Recipe) -> str:
    """The first field in which two recipes differ."""
    left, right = one.model_dump(), other.model_dump()
    for section, values in left.items():
        if values != right[section]:
            if isinstance(values, dict) and isinstance(right[section], dict):
                field = next(name for name in values if values[name] != right[section][name])
                return f"{section}.{field} is {values[field]!r}, now {right[section][field]!r}"
            return section
    return "nothing"
