"""Write releases: the graphs once, then for the base and after every task one folder that can be deployed."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from r1export import __version__
from r1export.adapt.evaluate import all_classes, class_embeddings, top1_among
from r1export.errors import Unsupported
from r1export.export.audit import audit_reexport
from r1export.export.graph import GRAPHS, export_graphs
from r1export.export.int8 import calibrate
from r1export.export.precision import WRITERS
from r1export.export.preprocess import write_preprocess
from r1export.export.write_release import PREPROCESS, Golden, ReleaseContent, TaskClasses, refused_writes, write_release
from r1export.pipeline.context import RunContext
from r1export.pipeline.environment import versions
from r1export.pipeline.variant import RANGES, Variant
from r1export.pipeline.verification.inputs import BATCH, calibration
from r1export.update.atomic_io import new_folder, sha256_file, write_json
from r1export.update.factors import ExpertUpdate, Rows
from r1export.update.release_manifest import BaseModel, MergedUpdate
from r1export.verify.graph_digest import graph_digest
from r1export.verify.runtime import open_session, runner

GOLDEN_IMAGES = 8  # images in golden.safetensors, spread over the tasks: 4.8 MB at 224 px


def export_releases(context: RunContext, *, overwrite: bool = False, audit: bool = False) -> list[Path]:
    """Write the graphs and releases that are not there, in every precision of the recipe; returns the release folders.

    With `audit` the merged model of the last release is exported afresh and compared with it, node by node and byte by byte.

    Raises CheckFailed if the audit finds a difference.
    """
    run, recipe = context.run, context.recipe
    if overwrite:
        for folder in (run.graphs, run.path / "releases", run.path / "variants"):
            shutil.rmtree(folder, ignore_errors=True)
    updates, releases = run.updates(recipe), []
    with refused_writes(run.path):
        for precision in ("fp32", *recipe.export.variants):
            variant = Variant(context, precision)
            if not variant.exports.graphs.exists():
                context.progress.step(f"Exporting the graphs in {precision}, once")
                with new_folder(variant.exports.graphs) as folder:
                    _write_graphs(variant, folder)
            releases += _write_releases(variant, updates)
    if audit:
        _audit(context, updates)
    return releases


def _write_graphs(variant: Variant, folder: Path) -> None:
    context, single = variant.context, variant.context.run.graphs
    if variant.precision == "fp32":
        export_graphs(
            context.clip.model,
            context.clip.preprocess.size,
            _context_length(context),
            folder,
            opset=context.recipe.export.opset,
        )
        with suppress(Unsupported):  # some preprocessing has no faithful graph: preprocess.json alone describes it
            write_preprocess(context.clip.preprocess.to_json(), folder / PREPROCESS, opset=context.recipe.export.opset)
        return
    WRITERS[variant.precision](single, folder)
    if (single / PREPROCESS).exists():
        shutil.copyfile(single / PREPROCESS, folder / PREPROCESS)
    if variant.precision == "int8":
        base = context.run.releases(context.recipe)[0]
        write_json(folder / RANGES, {name: list(ends) for name, ends in calibrate(base, calibration(context)).items()})


def _write_releases(variant: Variant, updates: list[ExpertUpdate]) -> list[Path]:
    context, metrics = variant.context, variant.context.run.metrics()
    adapted = tuple(ExpertUpdate.stack(updates).factors)
    releases = variant.exports.releases(context.recipe)[: len(updates) + 1]
    with context.progress.track(f"Writing releases in {variant.precision}", len(releases)) as advance:
        for number, path in enumerate(releases):
            if not path.exists():
                with context.with_updates_applied(updates[:number]) as merged:
                    content = _content(variant, number, path.name, updates[:number], merged, metrics, adapted)
                    write_release(content, variant.exports.graphs, path)
            advance(path.name)
    return releases


def _audit(context: RunContext, updates: list[ExpertUpdate]) -> None:
    last = context.run.releases(context.recipe)[len(updates)]
    context.progress.step(f"Exporting {last.name} afresh to compare")
    with context.with_updates_applied(updates):
        audit_reexport(
            context.clip.model,
            context.clip.preprocess.size,
            _context_length(context),
            last,
            opset=context.recipe.export.opset,
        )


def _context_length(context: RunContext) -> int:
    return context.clip.tokenize([""]).shape[1]


def _content(
    variant: Variant,
    number: int,
    name: str,
    updates: list[ExpertUpdate],
    merged: dict[str, np.ndarray],
    metrics: dict[str, Any],
    adapted: tuple[Rows, ...],
) -> ReleaseContent:
    """What release `number` holds, from the model that has learned `updates`."""
    context, recipe, clip = variant.context, variant.context.recipe, variant.context.clip
    learned = {task.name for task in context.tasks[:number]}
    tasks = tuple(
        TaskClasses(t.name, t.classes, t.templates, class_embeddings(clip, t), t.name in learned) for t in context.tasks
    )
    values = metrics["accuracy"][number - 1] if number else metrics["zero_shot"]
    trained = dict(zip(metrics["tasks"], values, strict=True))
    return ReleaseContent(
        name=name,
        sequence=number,
        precision=variant.precision,
        base=BaseModel(**context.run.base()),
        updates=tuple(
            MergedUpdate(t.name, sha256_file(context.run.task(i, t.name) / "factors.safetensors"))
            for i, t in enumerate(recipe.stream[:number], 1)
        ),
        weights=merged if variant.precision == "fp32" else variant.tensors(updates),
        tasks=tasks,
        golden=_golden(context),
        preprocess=clip.preprocess.to_json(),
        tokenizer=clip.tokenizer,
        graph_digests={graph: graph_digest(variant.exports.graphs / graph) for graph in GRAPHS},
        accuracy=lambda folder: trained if variant.precision == "fp32" else _accuracies(context, folder, tasks),
        versions={"r1export": __version__} | versions(),
        tolerance=variant.tolerance,
        adapted=adapted,
    )


def _accuracies(context: RunContext, folder: Path, tasks: tuple[TaskClasses, ...]) -> dict[str, float]:
    """Top-1 of a release's own image tower in onnxruntime, on all test images of every task."""
    run = runner(open_session(folder / "visual.onnx"))
    union = all_classes(context.clip, context.tasks) if context.recipe.data.candidates == "all" else None
    found = {}
    for task, classes in zip(context.tasks, tasks, strict=True):
        batches = context.tests[task.name].batches(BATCH)
        embeds = [run({"pixel_values": context.clip.preprocess.normalize(batch).numpy()}) for batch in batches]
        found[task.name] = top1_among(np.concatenate(embeds), task, union or classes.embeddings)
    return found


@torch.inference_mode()
def _golden(context: RunContext) -> Golden:
    """Real test images of all tasks in turn, a prompt of each, and what torch makes of them."""
    clip, tasks = context.clip, context.tasks
    picks = [(tasks[i % len(tasks)], i // len(tasks)) for i in range(GOLDEN_IMAGES)]
    pixels = torch.cat([context.tests[task.name].batch(np.array([place % len(task.test)])) for task, place in picks])
    tokens = clip.tokenize([task.templates[0].format(task.classes[place % len(task.classes)]) for task, place in picks])
    values = clip.preprocess.normalize(pixels)
    return Golden(
        values.numpy(),
        clip.encode_image(pixels).float().cpu().numpy(),
        tokens.cpu().numpy(),
        clip.encode_text(tokens).float().cpu().numpy(),
    )
