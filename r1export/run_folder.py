"""A run on disk: its recipe, base model, accuracies, experts, and how far it has come.

Whether a step is done follows from its files, which are written atomically.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, TypeVar

from filelock import FileLock, Timeout
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from r1export.errors import InputError, refused
from r1export.recipe import Recipe
from r1export.recipe_file import load_recipe
from r1export.update.atomic_io import PARTIAL, read_regular, remove, write_file, write_json
from r1export.update.factors import ExpertUpdate
from r1export.update.release_manifest import BaseModel
from r1export.update.run_layout import RunLayout
from r1export.update.strict_json import parse_json
from r1export.verify.results import Gaps, Guard, Probe, TaskInputs

MAX_JSON = 64 << 20  # bytes
LOCK = ".lock"  # held by the command that works on the run
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
T = TypeVar("T")
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class RunMetrics:
    """metrics.json: top-1 accuracies in 0..1. `accuracy[i][j]` is measured on task j after task i; `transfer` is None for a single task."""

    __pydantic_config__ = _STRICT

    tasks: tuple[str, ...]
    zero_shot: tuple[Share, ...]
    accuracy: tuple[tuple[Share, ...], ...]
    zero_shot_avg: Share
    transfer: Share | None
    avg: Share
    last: Share
    forgetting: tuple[float, ...]
    probe: Probe | None

    def __post_init__(self) -> None:
        count = len(self.tasks)
        if {len(self.zero_shot), len(self.accuracy), len(self.forgetting), *map(len, self.accuracy)} != {count}:
            raise ValueError(f"the accuracies don't match {count} tasks")
        if self.probe and len(self.probe.values) != count + 1:
            raise ValueError(f"the probe has {len(self.probe.values)} accuracies, expected {count + 1}")

    def after(self, number: int) -> dict[str, float]:
        """The accuracy on every task after task `number`; 0 is zero-shot."""
        row = self.accuracy[number - 1] if number else self.zero_shot
        return dict(zip(self.tasks, row, strict=True))

    def to_json(self) -> dict[str, Any]:
        """The JSON document, keys in file order."""
        return asdict(self)


@dataclass(frozen=True)
class RunRecord:
    """run.json: the version of r1export, the seed, the base model, the software, and when the run started (UTC)."""

    __pydantic_config__ = _STRICT

    r1export: str
    seed: int
    base: BaseModel
    versions: dict[str, str]
    started: str

    def to_json(self) -> dict[str, Any]:
        """The JSON document, keys in file order."""
        return asdict(self) | {"base": self.base.to_json()}


@dataclass(frozen=True)
class RunInputs:
    """inputs.json: the images of every task, the probe last."""

    __pydantic_config__ = _STRICT

    tasks: tuple[TaskInputs, ...]

    def to_json(self) -> dict[str, Any]:
        """The JSON document, keys in file order."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class TaskMetrics:
    """tasks/NN-NAME/metrics.json: how a task was trained. `losses` has one supervised loss for each step; `gaps` are added by `verify`."""

    __pydantic_config__ = _STRICT

    task: str
    images: int
    losses: tuple[float, ...]
    seconds: float
    peak_rss_mb: float
    trainable_parameters: int
    factor_bytes: int
    guard: Guard | None = None
    gaps: Gaps | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON document, keys in file order, without what is None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class RunFolder(RunLayout):
    """A run on disk."""

    def recipe(self) -> Recipe:
        """Raises InputError if this is not a run."""
        if not self.recipe_file.exists():
            raise InputError(
                f"{self.path}: not a run: no recipe.toml",
                "use the --out folder of r1export run, or a release folder",
            )
        return load_recipe(self.recipe_file)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run against other commands, and remove partial files that a killed command left.

        Raises InputError if another command is working on the run.
        """
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise InputError(
                f"{self.path}: another r1export command is working on this run",
                "wait until it ends, or choose another --out",
            ) from None
        try:
            for path in self.path.rglob(f".*{PARTIAL}*"):
                remove(path)
            yield
        finally:
            lock.release()

    def updates(self, recipe: Recipe) -> list[ExpertUpdate]:
        """The factors of the tasks trained so far, in order."""
        files = (self.task(i, task.name).factors for i, task in enumerate(recipe.stream, 1))
        return [ExpertUpdate.read(file) for file in takewhile(Path.exists, files)]

    def task_metrics(self, number: int, name: str) -> TaskMetrics | None:
        """What training recorded about a task, None if the file was deleted. Raises InputError if it is corrupted."""
        path = self.task(number, name).metrics
        return read_value(TaskMetrics, path, "delete the file") if path.exists() else None

    def keep_gaps(self, number: int, name: str, gaps: Gaps) -> None:
        """Add G1 to G3 of a task, which `verify` measures, to what training recorded."""
        if metrics := self.task_metrics(number, name):
            write_json(self.task(number, name).metrics, replace(metrics, gaps=gaps).to_json())

    def base(self) -> BaseModel:
        """The base model. Raises InputError if run.json is missing or corrupted."""
        remedy = "train the run with r1export train, or start over with --overwrite"
        return read_value(RunRecord, self.run_json, remedy).base

    def metrics(self) -> RunMetrics:
        """Raises InputError if metrics.json is missing (the run was not trained) or corrupted."""
        return read_value(RunMetrics, self.metrics_file, "train the run first: r1export train")

    def inputs(self) -> tuple[TaskInputs, ...]:
        """What training recorded about the images; empty for runs of older versions. Raises InputError if inputs.json is corrupted."""
        if not self.inputs_file.exists():
            return ()
        return read_value(RunInputs, self.inputs_file, "delete the file and run again with --resume").tasks


def read_value(kind: type[T], path: Path, remedy: str) -> T:
    """The JSON object in a file as a value of `kind`. Raises InputError with `remedy` if it is missing or invalid."""
    try:
        data = read_regular(path, MAX_JSON)
        parse_json(data, "JSON", MAX_JSON)
        return TypeAdapter(kind).validate_json(data, strict=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", remedy) from None
    except InputError as error:
        raise InputError(f"{path}: corrupted: {error.message}", remedy) from None
    except ValidationError as error:
        raise InputError(f"{path}: corrupted: {_faults(error)}", remedy) from None


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError with `remedy` if it is missing or corrupted."""
    return read_value(dict[str, Any], path, remedy)


def _faults(error: ValidationError) -> str:
    """The missing keys, or the first invalid one."""
    faults = [(".".join(map(str, fault["loc"])), fault["type"], fault["msg"]) for fault in error.errors()]
    if missing := [member for member, kind, _ in faults if kind == "missing"]:
        return f"missing keys: {', '.join(missing)}"
    member, _, message = faults[0]
    return f"{member}: {message}" if member else message


def check_run(path: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Check whether `open_run` would succeed, without writing anything.

    Raises:
        InputError: the folder is not empty and neither flag is set, it has another recipe, or it is not a run.
    """
    run = RunFolder(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path.is_dir() and run.recipe_file.exists()):
        raise InputError(f"{path}: the folder is not empty and not a run", "choose another --out; nothing was modified")
    if not (resume or overwrite):
        raise InputError(f"{path}: a run already exists", "resume it with --resume, or delete it with --overwrite")
    if resume and not overwrite and run.recipe() != recipe:
        raise InputError(
            f"{path}: a run of another recipe already exists: {_difference(run.recipe(), recipe)}",
            "choose another --out, or use --overwrite",
        )


def open_run(path: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> RunFolder:
    """A new run, or the existing one: `resume` continues it, `overwrite` deletes it first.

    Raises InputError as `check_run` does, Unsupported if the disk is full or the folder is not writable.
    """
    check_run(path, recipe, resume=resume, overwrite=overwrite)
    run = RunFolder(path)
    try:
        if overwrite and run.recipe_file.exists():
            with run.lock():
                shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
        if not run.recipe_file.exists():
            write_file(run.recipe_file, recipe.dumps().encode())
    except OSError as error:
        raise refused(error, f"cannot write {path}") from error
    return run


def _difference(before: Recipe, after: Recipe) -> str:
    """The first field in which two recipes differ."""
    left, right = before.model_dump(), after.model_dump()
    for section, values in left.items():
        if values != right[section]:
            if isinstance(values, dict) and isinstance(right[section], dict):
                field = next(name for name in values if values[name] != right[section][name])
                return f"{section}.{field} is {values[field]!r}, now {right[section][field]!r}"
            return section
    return "nothing"
