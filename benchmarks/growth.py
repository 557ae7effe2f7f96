"""What a run costs as it grows: processor time, bytes and memory of every step over the number of tasks and of classes.

    python benchmarks/growth.py [--tasks 1 10 50 100 200] [--classes 10 100 1000 3000] [--json FILE]

A small model (builtin:world) is adapted to one task for real; the experts of the others are those of that task in another
order, so that they have their own digests and the same arithmetic. Tasks grow at 10 classes, classes at 10 tasks. Each point
is measured in a process of its own. Seconds are those of all processors together, with child processes, since other work on
the machine affects the wall clock more. A last column says how much a step of the largest run costs compared with the smallest.

    start      resume a run: read what is there, one step of the next task, its accuracy on all tasks
    merge      all experts into the base, in memory           export     one release: merge, embed classes, write, hash
    verify     the release by itself, without its time        bundle 0   an update for a new device
    bundle N-1 one for a device that lacks the last task      slot       that device takes it, files are rebuilt
    overlay    the same, files are derived and compared, kilobytes written
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
from PIL import Image

from r1export.device import install, provision
from r1export.export.write_release import write_release
from r1export.pipeline.context import NoProgress, RunContext
from r1export.pipeline.export import _content, _Prompts, _write_graphs
from r1export.pipeline.train import train_tasks
from r1export.pipeline.variant import Variant
from r1export.pipeline.verification.release import verify_release
from r1export.recipe_file import load_recipe
from r1export.run_folder import RunFolder, open_run
from r1export.update.atomic_io import new_folder, write_json
from r1export.update.envelope import SecretKey
from r1export.update.factors import ExpertUpdate, Factors
from r1export.update.lab.publish import Step, Terms, make_bundle

KEY, TERMS = SecretKey(bytes(range(32))), Terms(created=1_800_000_000)
FEW_CLASSES, FEW_TASKS = 10, 10
RECIPE = """[base]
model = "builtin:world"
[data]
shots = 1
[train]
iterations = 1
batch_size = 8
protect = 0.0
protect_own = 0.0
[pool]
init = "random"
alpha = 12.0
"""


Column = Literal["tasks", "classes"]
Group = Literal["seconds", "bytes", "peak_mb"]
GROUPS: tuple[tuple[Group, str, float], ...] = (("seconds", "s", 1.0), ("bytes", "kB", 1000.0), ("peak_mb", "MB", 1.0))


class Point(TypedDict):
    """A run of so many tasks and classes, and what each step took and each file has."""

    tasks: int
    classes: int
    seconds: dict[str, float]
    bytes: dict[str, int]
    peak_mb: dict[str, int]


@dataclass
class Costs:
    """Seconds of processor time of each step, and sizes in bytes."""

    seconds: dict[str, float] = field(default_factory=dict)
    nbytes: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        before = sum(os.times()[:4])
        yield
        self.seconds[name] = round(sum(os.times()[:4]) - before, 3)


def write_pack(path: Path, classes: int) -> None:
    """A task of `classes` classes: one small image of noise each to learn from, four to test."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(classes + 4):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(buffer, "PNG")
        files.append(np.frombuffer(buffer.getvalue(), np.uint8))
    label = np.concatenate([np.arange(classes), np.arange(4) % classes])
    split = np.concatenate([np.zeros(classes, int), np.full(4, 2)])
    names = np.array([f"thing {i}" for i in range(classes)])
    off = np.cumsum([0, *map(len, files)])
    np.savez(path, blob=np.concatenate(files), off=off, label=label, split=split, names=names)


def open_context(folder: Path, tasks: int, classes: int) -> RunContext:
    """A new run of `tasks` tasks, none trained yet."""
    write_pack(folder / "things.npz", classes)
    stream = "".join(f'[[tasks]]\nname = "t{i}"\nsource = "npz:{folder}/things.npz"\n' for i in range(1, tasks + 1))
    (folder / "recipe.toml").write_text(RECIPE + stream, encoding="utf-8")
    recipe = load_recipe(folder / "recipe.toml")
    open_run(folder / "run", recipe, resume=False, overwrite=False)
    return RunContext(RunFolder(folder / "run"), recipe, "cpu", NoProgress())


def train_one(folder: Path, iterations: int = 60) -> Path:
    """Experts that were really trained: the factors of one task."""
    context = open_context(folder, 1, FEW_CLASSES)
    recipe = context.recipe.model_copy(
        update={"train": context.recipe.train.model_copy(update={"iterations": iterations})}
    )
    context = RunContext(context.run, recipe, "cpu", NoProgress())
    train_tasks(context)
    return context.run.task(1, "t1").factors


def give_tasks(context: RunContext, factors: Path, tasks: int) -> None:
    """Write the folders of the first `tasks` tasks as training does, each with the same experts in an order of its own."""
    learned = ExpertUpdate.read(factors)
    for number in range(1, tasks + 1):
        folder = context.run.task(number, f"t{number}")
        folder.path.mkdir(parents=True)
        turned = {
            rows: Factors(np.roll(pair.u, number, 1) * np.float32(1 + number / 1024), np.roll(pair.v, number, 0))
            for rows, pair in learned.factors.items()
        }
        ExpertUpdate(turned).write(folder.factors)
        write_json(folder.accuracy, {task.name: 0.5 for task in context.recipe.stream})


def measure(folder: Path, factors: Path, tasks: int, classes: int) -> Costs:
    """All steps of the release after task `tasks`, on a run with one task more that is yet to be trained."""
    costs, context = Costs(), open_context(folder, tasks + 1, classes)
    give_tasks(context, factors, tasks)
    write_json(context.run.zero_shot, {task.name: 0.5 for task in context.recipe.stream})
    with costs.step("start"):
        train_tasks(context)
    updates, variant = context.run.updates(context.recipe)[:tasks], Variant(context, "fp32")
    with costs.step("merge"):
        context.merged(updates)
    with new_folder(variant.exports.graphs) as graphs:
        _write_graphs(variant, graphs)
    prompts = _Prompts(context, tuple(updates))
    for number in sorted({0, tasks - 1, tasks}):
        with costs.step("export"), context.with_updates_applied(updates[:number]) as merged:
            write_release(_content(variant, number, prompts, merged), variant.exports.graphs, variant.releases[number])
    release = variant.releases[tasks]
    with costs.step("verify"):
        verify_release(release, budget=None)
    _measure_updates(costs, context, tasks, folder)
    costs.nbytes["release"] = sum(path.stat().st_size for path in release.rglob("*") if path.is_file())
    return costs


def _measure_updates(costs: Costs, context: RunContext, tasks: int, folder: Path) -> None:
    (folder / "key.pub").write_text(KEY.public.to_pem())
    for name, release, since in (("before", tasks - 1, 0), ("bundle 0", tasks, 0), ("bundle N-1", tasks, tasks - 1)):
        if release:
            with costs.step(name):
                bundle = make_bundle(context.run.path, Step(release, since), [KEY], TERMS)
            (folder / f"{name}.r1u").write_bytes(bundle.to_bytes())
            costs.nbytes[name] = len(bundle.to_bytes())
    for mode in ("slot", "overlay"):
        store, base = folder / mode, Variant(context, "fp32").releases[0]
        provision.init(store, base, [folder / "key.pub"], mode=mode, health="none")
        if tasks > 1:
            install.apply(store, folder / "before.r1u")
        with costs.step(mode):
            install.apply(store, folder / "bundle N-1.r1u")
        files = {path for path in store.rglob("*") if path.is_file() and not path.is_symlink()}
        costs.nbytes[f"store {mode}"] = sum(path.stat().st_size for path in files)


def point(factors: Path, tasks: int, classes: int) -> Point:
    """One point, in a process of its own."""
    command = [sys.executable, __file__, "--point", str(factors), str(tasks), str(classes)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    document: Point = json.loads(done.stdout.splitlines()[-1])
    print(f"{tasks} tasks, {classes} classes: {document}", file=sys.stderr, flush=True)
    return document


def run_point(factors: Path, tasks: int, classes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        costs = measure(Path(folder), factors, tasks, classes)
    peak = {"lab": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10}
    found: Point = {
        "tasks": tasks,
        "classes": classes,
        "seconds": costs.seconds,
        "bytes": costs.nbytes,
        "peak_mb": peak,
    }
    print(json.dumps(found))


def table(points: list[Point], column: Column) -> str:
    """Rows are steps and sizes, columns the points."""
    lines = [
        f"| | {' | '.join(f'{p[column]} {column}' for p in points)} | last / first |",
        "|---|" + "---|" * (len(points) + 1),
    ]
    for group, unit, scale in GROUPS:
        for name in points[-1][group]:
            values = [p[group].get(name) for p in points]
            shown = ["-" if value is None else f"{value / scale:.4g}" for value in values]
            growth = f"{points[-1][group][name] / values[0]:.1f}" if values[0] else "-"
            lines.append(f"| {name}, {unit} | {' | '.join(shown)} | {growth} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="*", default=[1, 10, 50, 100, 200])
    parser.add_argument("--classes", type=int, nargs="*", default=[10, 100, 1000, 3000])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.point:
        run_point(Path(asked.point[0]), int(asked.point[1]), int(asked.point[2]))
        return
    points: dict[Column, list[Point]] = {"tasks": [], "classes": []}
    with tempfile.TemporaryDirectory() as folder:
        factors = train_one(Path(folder))
        sizes: list[tuple[Column, int, int]] = [("tasks", tasks, FEW_CLASSES) for tasks in asked.tasks]
        sizes += [("classes", FEW_TASKS, classes) for classes in asked.classes]
        for column, tasks, classes in sizes:
            points[column].append(point(factors, tasks, classes))
            # After each point: the largest ones take long, and a sweep that is stopped keeps what it has.
            if asked.json:
                write_json(asked.json, points)
    for column, measured in points.items():
        if measured:
            print(table(measured, column), end="\n\n")


if __name__ == "__main__":
    main()
