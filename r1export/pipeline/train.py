"""Train the tasks in sequence: measure zero-shot, then for each task train, pack, merge and evaluate."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from r1export import __version__
from r1export.adapt import distributed
from r1export.adapt.clip import licence
from r1export.adapt.distillation import BATCH, DistillationTargets, distillation_targets, reference_names
from r1export.adapt.evaluate import accuracy, all_classes
from r1export.adapt.full_finetune import fine_tune_
from r1export.adapt.gradient_init import init_along_gradient_
from r1export.adapt.guard import AREA, VIEWS, Answers, Guarded, guard_
from r1export.adapt.image_cache import Pixels, RandomCrop
from r1export.adapt.inject import eject_experts_
from r1export.adapt.input_span import (
    Span,
    new_directions,
    own_directions,
    parse_span,
    set_spans_,
    span_tensors,
)
from r1export.adapt.metrics import stream_metrics
from r1export.adapt.pack import load_rounded_factors_, pack_experts, pool_tensors, set_past_experts_, set_past_pools_
from r1export.adapt.pool import Pools
from r1export.adapt.trainer import TrainingTask, TrainStep, reset_pools_, task_prompts, train_pools_
from r1export.data.task import Task
from r1export.errors import InputError
from r1export.export.write_release import refused_writes
from r1export.pipeline.context import RunContext, inject_pools_, inputs_of, train_settings
from r1export.pipeline.environment import now, versions
from r1export.pipeline.golden import golden_inputs
from r1export.pipeline.tensorboard import log_accuracies, step_log
from r1export.recipe import Recipe
from r1export.run_folder import RunInputs, RunMetrics, RunRecord, Share, TaskMetrics, read_value
from r1export.update.atomic_io import write_json
from r1export.update.container import digest, read_tensors, write_tensors
from r1export.update.factors import ExpertUpdate
from r1export.update.release_manifest import BaseModel
from r1export.update.run_layout import TaskLayout
from r1export.verify.results import Guard, Probe

OWN_IMAGES = 256  # images of a task for train.protect_own
DTYPES = {"fp32": np.float32, "fp16": np.float16}


def train_tasks(context: RunContext) -> RunMetrics:
    """Train the remaining tasks and return the content of metrics.json."""
    run, recipe = context.run, context.recipe
    with refused_writes(run.path):
        _write_run_json(context)
        zero_shot = _cached_accuracies(context, run.zero_shot, "Zero-shot")
        rows: list[dict[str, float]] = []
        updates: list[ExpertUpdate] = []
        for number, task in enumerate(context.tasks, 1):
            folder = run.task(number, task.name)
            if not folder.factors.exists():
                with context.with_updates_applied(updates):
                    _train_task(context, number, task, updates, folder)
            distributed.wait()
            updates.append(ExpertUpdate.read(folder.factors))
            # Measured accuracies need no merge: otherwise resuming at task N would merge N^2 / 2 times.
            merged = nullcontext() if folder.accuracy.exists() else context.with_updates_applied(updates)
            with merged:
                rows.append(_cached_accuracies(context, folder.accuracy, f"After {task.name}"))
            log_accuracies(context, number, rows[-1])
        metrics = _metrics(recipe, zero_shot, rows)
        if distributed.is_first():
            write_json(run.inputs_file, RunInputs(inputs_of(context)).to_json())
            write_json(run.metrics_file, metrics.to_json())
    return metrics


def _cached_accuracies(context: RunContext, path: Path, title: str) -> dict[str, float]:
    """The accuracies of the current model, from `path` if they were measured before."""
    if not path.exists() and distributed.is_first():
        write_json(path, _evaluate(context, title))
    distributed.wait()
    remedy = "delete the file and run again with --resume"
    accuracies, probe = read_value(dict[str, Share], path, remedy), context.recipe.probe
    names = [task.name for task in (*context.recipe.stream, *((probe,) if probe else ()))]
    if missing := [name for name in names if name not in accuracies]:
        raise InputError(f"{path}: corrupted: no accuracy for {', '.join(missing)}", remedy)
    return accuracies


def _write_run_json(context: RunContext) -> None:
    path = context.run.run_json
    source = context.recipe.base
    terms = "Apache-2.0" if source.model.startswith("builtin:") else licence(source.pretrained)
    local = source.model.startswith("local-dir:")  # whose path depends on the machine
    base = BaseModel(context.clip.name if local else source.model or context.clip.name, digest(context.base), terms)
    if path.exists():
        stored = context.run.base()
        if (stored.name, stored.sha256, stored.licence) != (base.name, base.sha256, base.licence):
            raise InputError(
                f"{path}: the run was started with another base model",
                "restore the original weights, or use --overwrite",
            )
    elif distributed.is_first():
        record = RunRecord(__version__, context.recipe.train.seed, _with_form(base, context), versions(), now())
        write_json(path, record.to_json())


def _with_form(base: BaseModel, context: RunContext) -> BaseModel:
    """`base` with the effect of its deployed form: the max. difference of the embeddings of test images of all tasks."""
    clip = context.clip
    if not clip.deployed_form:
        return base
    original, pixels = context.original(), golden_inputs(context).pixels
    with torch.inference_mode():
        difference = float((original.encode_image(pixels) - clip.encode_image(pixels)).abs().max())
    context.progress.step(
        f"Converted the image tower to its deployed form: embeddings differ by at most {difference:.1e}"
    )
    return replace(
        base,
        deployed_form=clip.deployed_form,
        original_sha256=digest(original.parameters()),
        deployed_difference=difference,
    )


def _evaluate(context: RunContext, title: str) -> dict[str, float]:
    """Accuracy of the current model on every task and the probe, by name."""
    tasks = (*context.tasks, *((context.probe,) if context.probe else ()))
    learner = context.learner
    union = all_classes(learner.clip, context.tasks) if context.recipe.data.candidates == "all" else None
    accuracies = {}
    with context.progress.track(f"{title}: accuracy", len(tasks)) as advance:
        for task in tasks:
            candidates = None if task is context.probe else union
            accuracies[task.name] = accuracy(learner.clip, task, learner.tests[task.name], candidates)
            advance(f"{task.name} {100 * accuracies[task.name]:.1f} %")
    return accuracies


@dataclass(frozen=True)
class TaskJob:
    """One task to train: the updates of `earlier` tasks, its folder, and the callback of every step."""

    context: RunContext
    training: TrainingTask
    earlier: list[ExpertUpdate]
    folder: TaskLayout
    on_step: Callable[[TrainStep], None]


@dataclass(frozen=True)
class _Trained:
    """The loss of every step, the update to merge, the number of trained parameters, and what the guard did."""

    losses: list[float]
    update: ExpertUpdate
    parameters: int
    guarded: Guarded | None = None


def _train_task(context: RunContext, number: int, task: Task, earlier: list[ExpertUpdate], folder: TaskLayout) -> None:
    """Train one task on the model with `earlier` merged. factors.safetensors is written last: it marks the task as done."""
    recipe, started = context.recipe, time.perf_counter()
    folder.path.mkdir(parents=True, exist_ok=True)
    title = f"Task {number} of {len(context.tasks)}: {task.name}"
    training = TrainingTask(number, task, context.learner.trains[task.name], train_settings(recipe.train))
    if recipe.train.distill_weight:
        training = replace(training, targets=_distillation_targets(context, training, title))
    train = _train_all_weights if recipe.train.method == "full" else _train_experts
    with context.progress.track(title, recipe.train.iterations) as advance, step_log(context, number) as log:

        def on_step(step: TrainStep) -> None:
            advance(_note(step, recipe))
            log(step)

        trained = train(TaskJob(context, training, earlier, folder, on_step))
    if not distributed.is_first():
        return
    metrics = TaskMetrics(
        task=task.name,
        images=len(task.train),
        losses=tuple(trained.losses),
        seconds=time.perf_counter() - started,
        peak_rss_mb=_peak_rss_mb(),
        trainable_parameters=trained.parameters,
        factor_bytes=trained.update.nbytes,
        guard=Guard(**asdict(trained.guarded)) if trained.guarded else None,
    )
    write_json(folder.metrics, metrics.to_json())
    trained.update.write(folder.factors)


def _train_experts(job: TaskJob) -> _Trained:
    clip, recipe, training = job.context.learner.clip, job.context.recipe, job.training
    pools = inject_pools_(clip, recipe)
    try:
        reset_pools_(pools, recipe.train.seed, training.number)
        limit = recipe.train.guard
        answers = None if limit is None else _answers(job)
        earlier = _leave_spans_(job, pools)
        _set_past_(job, pools)
        if recipe.pool.init == "gradient" and not job.folder.checkpoint.exists():
            init_along_gradient_(clip, pools, training)
        losses = train_pools_(clip, pools, training, checkpoint=job.folder.checkpoint, on_step=job.on_step)
        guarded = None if limit is None or answers is None else guard_(clip, pools, answers, limit)
        update = pack_experts(pools, DTYPES[recipe.pool.factors])
        if recipe.pool.factors != "fp32":
            load_rounded_factors_(pools, update)
        if distributed.is_first():
            write_tensors(job.folder.pool, pool_tensors(pools))
            _write_directions(job, pools, earlier)
        return _Trained(losses, update, sum(p.numel() for pool in pools.values() for p in pool.learned()), guarded)
    finally:
        eject_experts_(clip.model)


def _answers(job: TaskJob) -> Answers:
    """The answers of the model before the task on crops of the task's images, among reference names."""
    context, training = job.context, job.training
    crops = RandomCrop(training.seed(7), area=AREA)
    sample = _sample(training, VIEWS, training.seed(8))
    views = Pixels(training.task.train.subset(sample), context.clip.preprocess, augment=crops)
    return Answers.of(context.learner.clip, context.learner_images(views), _reference_names(context, training))


def _sample(training: TrainingTask, size: int, seed: int) -> np.ndarray:
    """At most `size` of the images that training visits, ascending int64."""
    images = training.visited()
    if len(images) <= size:
        return images
    return np.sort(np.random.default_rng(seed).choice(images, size, replace=False))


def _reference_names(context: RunContext, training: TrainingTask) -> tuple[str, ...]:
    """The names of ImageNet and of the classes of earlier tasks."""
    return reference_names([name for earlier in context.tasks[: training.number - 1] for name in earlier.classes])


def _set_past_(job: TaskJob, pools: Pools) -> None:
    """The experts of earlier tasks that the orthogonality loss uses."""
    if not job.earlier:
        return
    if job.context.recipe.pool.past == "merged":
        set_past_experts_(pools, ExpertUpdate.stack(job.earlier))
        return
    files = [job.context.task_layout(number).pool for number in range(1, job.training.number)]
    set_past_pools_(pools, {str(file): read_tensors(file) for file in files})


def _leave_spans_(job: TaskJob, pools: Pools) -> list[Span]:
    """Exclude the span of earlier tasks' inputs from the experts' inputs, and of the task's own. Returns the earlier span."""
    settings, training = job.context.recipe.train, job.training
    earlier = _earlier_spans(job, pools) if settings.protect else []
    set_spans_(pools, earlier)
    if settings.protect_own:
        sample = _sample(training, OWN_IMAGES, training.seed(5))
        own = own_directions(job.context.learner.clip, pools, training.train, sample, settings.protect_own)
        set_spans_(pools, [*earlier, own])
    for pool in pools.values():
        pool.leave_span_()
    return earlier


def _earlier_spans(job: TaskJob, pools: Pools) -> list[Span]:
    """The directions that every earlier task added to the span."""
    files = [job.context.task_layout(number).directions for number in range(1, job.training.number)]
    return [parse_span(read_tensors(file), pools, str(file)) for file in files]


def _write_directions(job: TaskJob, pools: Pools, earlier: list[Span]) -> None:
    share, training = job.context.recipe.train.protect, job.training
    if share:
        set_spans_(pools, earlier)
        clip = job.context.learner.clip
        prompts = task_prompts(clip, training)
        span = new_directions(clip, pools, training.train, prompts, share)
        write_tensors(job.folder.directions, span_tensors(span))


def _train_all_weights(job: TaskJob) -> _Trained:
    model = job.context.clip.model
    losses, update = fine_tune_(job.context.clip, job.training, job.on_step)
    return _Trained(losses, update, sum(p.numel() for p in model.parameters() if p.ndim))


def _distillation_targets(context: RunContext, training: TrainingTask, title: str) -> DistillationTargets:
    """The predictions of the model before a task, on the task's images and on reference names."""
    images = training.visited()
    names = _reference_names(context, training)
    batches = sum(-(-len(items) // BATCH) for items in (names, images))
    with context.progress.track(f"{title}: computing distillation targets", batches) as advance:
        return distillation_targets(context.learner.clip, training.train, images, names, advance)


def _note(step: TrainStep, recipe: Recipe) -> str:
    extra = "".join(f" + {value:.3f}" for value in (step.orthogonality, step.distillation) if value)
    return f"loss {step.loss:.3f}{extra}, {recipe.train.batch_size / step.seconds:.0f} images/s"


def _metrics(recipe: Recipe, zero_shot: dict[str, float], rows: list[dict[str, float]]) -> RunMetrics:
    names = [task.name for task in recipe.stream]
    matrix = tuple(tuple(row[name] for name in names) for row in rows)
    summary = stream_metrics(matrix)
    probe = recipe.probe.name if recipe.probe else None
    return RunMetrics(
        tasks=tuple(names),
        zero_shot=tuple(zero_shot[name] for name in names),
        accuracy=matrix,
        zero_shot_avg=float(np.mean([zero_shot[name] for name in names])),
        transfer=summary.transfer,
        avg=summary.avg,
        last=summary.last,
        forgetting=summary.forgetting,
        probe=Probe(name=probe, values=tuple(row[probe] for row in (zero_shot, *rows))) if probe else None,
    )


def _peak_rss_mb() -> float:
    """Peak resident memory of this process so far, in MB (2^20 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
