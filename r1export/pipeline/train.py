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
from r1export.adapt import distributed
from r1export.adapt.clip import digest, licence
from r1export.adapt.distillation import BATCH, Knowledge, recall, reference_names
from r1export.adapt.evaluate import accuracy, all_classes
from r1export.adapt.full_finetune import fine_tune_
from r1export.adapt.inject import adopt_, eject_experts_, pack_experts, pool_tensors, remember_, widen_spans_
from r1export.adapt.metrics import stream_metrics
from r1export.adapt.trainer import (
    Step,
    TrainSettings,
    input_directions,
    reset_pools_,
    task_prompts,
    train_pools_,
    visited,
)
from r1export.data.task import Task
from r1export.errors import InputError
from r1export.export.write_release import refused_writes
from r1export.pipeline.context import RunContext, inject_pools_
from r1export.pipeline.environment import now, versions
from r1export.pipeline.tensorboard import log_accuracies, step_log
from r1export.recipe import Recipe
from r1export.run_folder import read_json
from r1export.update.atomic_io import write_json
from r1export.update.container import read_tensors, write_tensors
from r1export.update.factors import ExpertUpdate

DTYPES = {"fp32": np.float32, "fp16": np.float16}
SPANS = "inputs.safetensors"  # leading directions of a task's inputs, kept for train.orthogonality = "input"


def train_tasks(context: RunContext) -> dict[str, Any]:
    """Learn every task that is not yet learned and return metrics.json. Goes on where an earlier run stopped."""
    run, recipe = context.run, context.recipe
    with refused_writes(run.path):
        _write_run_json(context)
        zero_shot = _remembered(context, run.path / "zero_shot.json", "Zero-shot")
        rows: list[dict[str, float]] = []
        updates: list[ExpertUpdate] = []
        for number, task in enumerate(context.tasks, 1):
            folder = run.task(number, task.name)
            if not (folder / "factors.safetensors").exists():
                with context.showing(updates):
                    _learn(context, number, task, updates, folder)
            distributed.wait()
            updates.append(ExpertUpdate.read(folder / "factors.safetensors"))
            with context.showing(updates):
                rows.append(_remembered(context, folder / "accuracy.json", f"After {task.name}"))
            log_accuracies(context, number, rows[-1])
        metrics = _metrics(recipe, zero_shot, rows)
        if distributed.is_first():
            write_json(run.metrics_file, metrics)
    return metrics


def _remembered(context: RunContext, path: Path, title: str) -> dict[str, float]:
    """The accuracies of the model as it stands, from `path` if they were measured before."""
    if not path.exists() and distributed.is_first():
        write_json(path, _evaluate(context, title))
    distributed.wait()
    remedy = "delete the file and run again with --resume"
    found, probe = read_json(path, remedy), context.recipe.probe
    names = [task.name for task in (*context.recipe.stream, *((probe,) if probe else ()))]
    if missing := [name for name in names if not isinstance(found.get(name), float | int)]:
        raise InputError(f"{path}: damaged: no accuracy of {', '.join(missing)}", remedy)
    return found


def _write_run_json(context: RunContext) -> None:
    path = context.run.path / "run.json"
    source = context.recipe.base
    terms = "Apache-2.0" if source.model.startswith("builtin:") else licence(source.pretrained)
    base = {"name": source.model or context.clip.name, "sha256": digest(context.base), "licence": terms}
    if path.exists() and context.run.base() != base:
        raise InputError(
            f"{path}: the run was started from another base model",
            "give back the weights it was started with, or --overwrite",
        )
    if not path.exists() and distributed.is_first():
        write_json(
            path,
            {
                "r1export": __version__,
                "seed": context.recipe.train.seed,
                "base": base,
                "versions": versions(),
                "started": now(),
            },
        )


def _evaluate(context: RunContext, title: str) -> dict[str, float]:
    """Accuracy of the model as it stands on every task and the probe, by name."""
    tasks = (*context.tasks, *((context.probe,) if context.probe else ()))
    union = all_classes(context.clip, context.tasks) if context.recipe.data.candidates == "all" else None
    found = {}
    with context.progress.track(f"{title}: accuracy", len(tasks)) as advance:
        for task in tasks:
            among = None if task is context.probe else union
            found[task.name] = accuracy(context.clip, task, context.tests[task.name], among)
            advance(f"{task.name} {100 * found[task.name]:.1f} %")
    return found


def _learn(context: RunContext, number: int, task: Task, earlier: list[ExpertUpdate], folder: Path) -> None:
    """Teach one task to the model that has learned `earlier`; factors.safetensors is written last, since it says so."""
    recipe, started = context.recipe, time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    learn = _fine_tune if recipe.train.method == "full" else _teach_pools
    title = f"Task {number} of {len(context.tasks)}: {task.name}"
    knowledge = _recall(context, number, task, title) if recipe.train.keep else None
    with context.progress.track(title, recipe.train.iterations) as advance, step_log(context, number) as log:

        def on_step(step: Step) -> None:
            advance(_note(step, recipe))
            log(step)

        learned = learn(_Turn(context, number, task, earlier, folder, on_step, knowledge))
    if not distributed.is_first():
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

    context: RunContext
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
    context, number, task, folder = turn.context, turn.number, turn.task, turn.folder
    recipe, settings = context.recipe, _settings(context.recipe)
    pools = inject_pools_(context.clip, recipe)
    try:
        reset_pools_(pools, recipe.train.seed, number)
        if turn.earlier:
            remember_(pools, ExpertUpdate.stack(turn.earlier))
        if settings.orthogonality == "input":
            for i, old in enumerate(context.tasks[: number - 1], 1):
                widen_spans_(pools, read_tensors(context.run.task(i, old.name) / SPANS))
        losses = train_pools_(
            context.clip, pools, task, context.trains[task.name], settings, number=number,
            checkpoint=folder / "checkpoint.safetensors", on_step=turn.on_step, knowledge=turn.knowledge,
        )  # fmt: skip
        if settings.orthogonality == "input":
            prompts = task_prompts(context.clip, task, settings.seed, number)
            spans = input_directions(context.clip, pools, context.trains[task.name], prompts)
            if distributed.is_first():
                write_tensors(folder / SPANS, spans)
        update = pack_experts(pools, DTYPES[recipe.pool.factors])
        if recipe.pool.factors != "fp32":
            adopt_(pools, update)
        if distributed.is_first():
            write_tensors(folder / "pool.safetensors", pool_tensors(pools))
        trainable = sum(p.numel() for pool in pools.values() for p in pool.learned())
        return _Learned(losses, update, trainable)
    finally:
        eject_experts_(context.clip.model)


def _recall(context: RunContext, number: int, task: Task, title: str) -> Knowledge:
    """What the model says before task `number`, which training then holds on to."""
    train = context.trains[task.name]
    wanted = visited(len(train), _settings(context.recipe), number)
    names = reference_names([name for old in context.tasks[: number - 1] for name in old.classes])
    batches = sum(-(-len(some) // BATCH) for some in (names, wanted))
    with context.progress.track(f"{title}: what the model knows before", batches) as advance:
        return recall(context.clip, train, wanted, names, advance, weight=context.recipe.train.keep)


def _fine_tune(turn: _Turn) -> _Learned:
    context, task = turn.context, turn.task
    losses, update = fine_tune_(
        context.clip, task, context.trains[task.name], _settings(context.recipe), number=turn.number, on_step=turn.on_step,
        knowledge=turn.knowledge,
    )  # fmt: skip
    return _Learned(losses, update, sum(p.numel() for p in context.clip.model.parameters() if p.ndim))


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
