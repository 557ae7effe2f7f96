"""Learn the tasks one after another: zero-shot, then for each task train, pack, merge and evaluate."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from r1export import __version__
from r1export.adapt import together
from r1export.adapt.baselines import fine_tune_
from r1export.adapt.clip import digest, licence
from r1export.adapt.evaluate import accuracy, all_classes
from r1export.adapt.experts import adopt_, eject_experts_, pack_experts, pool_tensors, remember_, widen_spans_
from r1export.adapt.knowledge import BATCH, Knowledge, recall, reference_names
from r1export.adapt.metrics import stream_metrics
from r1export.adapt.tasks import Task
from r1export.adapt.trainer import (
    Step,
    TrainSettings,
    input_directions,
    reset_pools_,
    task_prompts,
    train_pools_,
    visited,
)
from r1export.errors import InputError
from r1export.export.release import refused_writes
from r1export.pipeline.board import log_accuracies, step_log
from r1export.pipeline.environment import now, versions
from r1export.pipeline.stage import Stage, inject_pools_
from r1export.recipe import Recipe
from r1export.run_folder import read_json
from r1export.update.container import read_tensors, write_tensors
from r1export.update.factors import ExpertUpdate
from r1export.update.files import write_json

DTYPES = {"fp32": np.float32, "fp16": np.float16}
SPANS = "inputs.safetensors"  # leading directions of a task's inputs, kept for train.orthogonality = "input"


def train(stage: Stage) -> dict[str, Any]:
    """Learn every task that is not yet learned and return metrics.json. Goes on where an earlier run stopped."""
    run, recipe = stage.run, stage.recipe
    with refused_writes(run.path):
        _write_run_json(stage)
        zero_shot = _remembered(stage, run.path / "zero_shot.json", "Zero-shot")
        rows: list[dict[str, float]] = []
        updates: list[ExpertUpdate] = []
        for number, task in enumerate(stage.tasks, 1):
            folder = run.task(number, task.name)
            if not (folder / "factors.safetensors").exists():
                with stage.showing(updates):
                    _learn(stage, number, task, updates, folder)
            together.wait()
            updates.append(ExpertUpdate.read(folder / "factors.safetensors"))
            with stage.showing(updates):
                rows.append(_remembered(stage, folder / "accuracy.json", f"After {task.name}"))
            log_accuracies(stage, number, rows[-1])
        metrics = _metrics(recipe, zero_shot, rows)
        if together.is_first():
            write_json(run.metrics_file, metrics)
    return metrics


def _remembered(stage: Stage, path: Path, title: str) -> dict[str, float]:
    """The accuracies of the model as it stands, from `path` if they were measured before."""
    if not path.exists() and together.is_first():
        write_json(path, _evaluate(stage, title))
    together.wait()
    remedy = "delete the file and run again with --resume"
    found, probe = read_json(path, remedy), stage.recipe.probe
    names = [task.name for task in (*stage.recipe.stream, *((probe,) if probe else ()))]
    if missing := [name for name in names if not isinstance(found.get(name), float | int)]:
        raise InputError(f"{path}: damaged: no accuracy of {', '.join(missing)}", remedy)
    return found


def _write_run_json(stage: Stage) -> None:
    path = stage.run.path / "run.json"
    source = stage.recipe.base
    terms = "Apache-2.0" if source.model.startswith("builtin:") else licence(source.pretrained)
    base = {"name": source.model or stage.clip.name, "sha256": digest(stage.base), "licence": terms}
    if path.exists() and stage.run.base() != base:
        raise InputError(
            f"{path}: the run was started from another base model",
            "give back the weights it was started with, or --overwrite",
        )
    if not path.exists() and together.is_first():
        write_json(
            path,
            {
                "r1export": __version__,
                "seed": stage.recipe.train.seed,
                "base": base,
                "versions": versions(),
                "started": now(),
            },
        )


def _evaluate(stage: Stage, title: str) -> dict[str, float]:
    """Accuracy of the model as it stands on every task and the probe, by name."""
    tasks = (*stage.tasks, *((stage.probe,) if stage.probe else ()))
    union = all_classes(stage.clip, stage.tasks) if stage.recipe.data.candidates == "all" else None
    found = {}
    with stage.watch.track(f"{title}: accuracy", len(tasks)) as advance:
        for task in tasks:
            among = None if task is stage.probe else union
            found[task.name] = accuracy(stage.clip, task, stage.tests[task.name], among)
            advance(f"{task.name} {100 * found[task.name]:.1f} %")
    return found


def _learn(stage: Stage, number: int, task: Task, earlier: list[ExpertUpdate], folder: Path) -> None:
    """Teach one task to the model that has learned `earlier`; factors.safetensors is written last, since it says so."""
    recipe, started = stage.recipe, time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    learn = _fine_tune if recipe.train.method == "full" else _teach_pools
    title = f"Task {number} of {len(stage.tasks)}: {task.name}"
    knowledge = _recall(stage, number, task, title) if recipe.train.keep else None
    with stage.watch.track(title, recipe.train.iterations) as advance, step_log(stage, number) as log:

        def on_step(step: Step) -> None:
            advance(_note(step, recipe))
            log(step)

        learned = learn(_Turn(stage, number, task, earlier, folder, on_step, knowledge))
    if not together.is_first():
        return
    write_json(
        folder / "metrics.json",
        {
            "task": task.name, "images": len(task.train), "losses": learned.losses, "seconds": time.perf_counter() - started, "peak_rss_mb": _peak_rss_mb(),
            "trainable_parameters": learned.trainable, "factor_bytes": learned.update.nbytes,
        },
    )  # fmt: skip
    learned.update.write(folder / "factors.safetensors")


@dataclass(frozen=True)
class _Turn:
    """A task whose turn it is, number `number` of the stream: what was learned before, where its files go, who looks on."""

    stage: Stage
    number: int
    task: Task
    earlier: list[ExpertUpdate]
    folder: Path
    on_step: Callable[[Step], None]
    knowledge: Knowledge | None


@dataclass(frozen=True)
class _Learned:
    """The loss of every step, what to merge, and how many parameters were trained."""

    losses: list[float]
    update: ExpertUpdate
    trainable: int


def _teach_pools(turn: _Turn) -> _Learned:
    stage, number, task, folder = turn.stage, turn.number, turn.task, turn.folder
    recipe, settings = stage.recipe, _settings(stage.recipe)
    pools = inject_pools_(stage.clip, recipe)
    try:
        reset_pools_(pools, recipe.train.seed, number)
        if turn.earlier:
            remember_(pools, ExpertUpdate.stack(turn.earlier))
        if settings.orthogonality == "input":
            for i, old in enumerate(stage.tasks[: number - 1], 1):
                widen_spans_(pools, read_tensors(stage.run.task(i, old.name) / SPANS))
        losses = train_pools_(
            stage.clip, pools, task, stage.trains[task.name], settings, number=number,
            checkpoint=folder / "checkpoint.safetensors", on_step=turn.on_step, knowledge=turn.knowledge,
        )  # fmt: skip
        if settings.orthogonality == "input":
            prompts = task_prompts(stage.clip, task, settings.seed, number)
            spans = input_directions(stage.clip, pools, stage.trains[task.name], prompts)
            if together.is_first():
                write_tensors(folder / SPANS, spans)
        update = pack_experts(pools, DTYPES[recipe.pool.factors])
        if recipe.pool.factors != "fp32":
            adopt_(pools, update)
        if together.is_first():
            write_tensors(folder / "pool.safetensors", pool_tensors(pools))
        trainable = sum(p.numel() for pool in pools.values() for p in pool.learned())
        return _Learned(losses, update, trainable)
    finally:
        eject_experts_(stage.clip.model)


def _recall(stage: Stage, number: int, task: Task, title: str) -> Knowledge:
    """What the model says before task `number`, which training then holds on to."""
    train = stage.trains[task.name]
    wanted = visited(len(train), _settings(stage.recipe), number)
    names = reference_names([name for old in stage.tasks[: number - 1] for name in old.classes])
    batches = sum(-(-len(some) // BATCH) for some in (names, wanted))
    with stage.watch.track(f"{title}: what the model knows before", batches) as advance:
        return recall(stage.clip, train, wanted, names, advance, weight=stage.recipe.train.keep)


def _fine_tune(turn: _Turn) -> _Learned:
    stage, task = turn.stage, turn.task
    losses, update = fine_tune_(
        stage.clip, task, stage.trains[task.name], _settings(stage.recipe), number=turn.number, on_step=turn.on_step,
        knowledge=turn.knowledge,
    )  # fmt: skip
    return _Learned(losses, update, sum(p.numel() for p in stage.clip.model.parameters() if p.ndim))


def _settings(recipe: Recipe) -> TrainSettings:
    return TrainSettings(**recipe.train.model_dump(exclude={"method", "keep", "tensorboard"}))


def _note(step: Step, recipe: Recipe) -> str:
    extra = "".join(f" + {value:.3f}" for value in (step.orthogonality, step.kept) if value)
    return f"loss {step.loss:.3f}{extra}, {recipe.train.batch_size / step.seconds:.0f} images/s"


def _metrics(recipe: Recipe, zero_shot: dict[str, float], rows: list[dict[str, float]]) -> dict[str, Any]:
    names = [task.name for task in recipe.stream]
    matrix = [[row[name] for name in names] for row in rows]
    summary = stream_metrics(matrix)
    probe = recipe.probe.name if recipe.probe else None
    return {
        "tasks": names, "zero_shot": [zero_shot[name] for name in names], "accuracy": matrix,
        "zero_shot_avg": float(np.mean([zero_shot[name] for name in names])),
        "transfer": summary.transfer, "avg": summary.avg, "last": summary.last, "forgetting": list(summary.forgetting),
        "probe": {"name": probe, "values": [zero_shot[probe], *(row[probe] for row in rows)]} if probe else None,
    }  # fmt: skip


def _peak_rss_mb() -> float:
    """Peak resident memory of this process so far, in MB (2^20 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
