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
from r1export.export.preprocess import write_preprocess
from r1export.export.quantized import calibrate
from r1export.export.release import PREPROCESS, Golden, ReleaseContent, TaskClasses, refused_writes, write_release
from r1export.export.variants import WRITERS
from r1export.pipeline.environment import versions
from r1export.pipeline.forms import RANGES, Form
from r1export.pipeline.samples import BATCH, calibration
from r1export.pipeline.stage import Stage
from r1export.update.factors import ExpertUpdate, Rows
from r1export.update.files import new_folder, sha256_file, write_json
from r1export.verify.digest import graph_digest
from r1export.verify.runtime import open_session, runner

GOLDEN_IMAGES = 8  # images in golden.safetensors, spread over the tasks: 4.8 MB at 224 px


def export(stage: Stage, *, overwrite: bool = False, audit: bool = False) -> list[Path]:
    """Write the graphs and releases that are not there, in every precision of the recipe; returns the release folders.

    With `audit` the merged model of the last release is exported afresh and compared with it, node by node and byte by byte.

    Raises CheckFailed if the audit finds a difference.
    """
    run, recipe = stage.run, stage.recipe
    if overwrite:
        for folder in (run.graphs, run.path / "releases", run.path / "variants"):
            shutil.rmtree(folder, ignore_errors=True)
    updates, releases = run.updates(recipe), []
    with refused_writes(run.path):
        for precision in ("fp32", *recipe.export.variants):
            form = Form(stage, precision)
            if not form.exports.graphs.exists():
                stage.watch.stage(f"Exporting the graphs in {precision}, once")
                with new_folder(form.exports.graphs) as folder:
                    _write_graphs(form, folder)
            releases += _write_releases(form, updates)
    if audit:
        _audit(stage, updates)
    return releases


def _write_graphs(form: Form, folder: Path) -> None:
    stage, single = form.stage, form.stage.run.graphs
    if form.precision == "fp32":
        export_graphs(
            stage.clip.model,
            stage.clip.preprocess.size,
            _context_length(stage),
            folder,
            opset=stage.recipe.export.opset,
        )
        with suppress(Unsupported):  # some preprocessing has no faithful graph: preprocess.json alone describes it
            write_preprocess(stage.clip.preprocess.to_json(), folder / PREPROCESS, opset=stage.recipe.export.opset)
        return
    WRITERS[form.precision](single, folder)
    if (single / PREPROCESS).exists():
        shutil.copyfile(single / PREPROCESS, folder / PREPROCESS)
    if form.precision == "int8":
        base = stage.run.releases(stage.recipe)[0]
        write_json(folder / RANGES, {name: list(ends) for name, ends in calibrate(base, calibration(stage)).items()})


def _write_releases(form: Form, updates: list[ExpertUpdate]) -> list[Path]:
    stage, metrics = form.stage, form.stage.run.metrics()
    adapted = tuple(ExpertUpdate.stack(updates).factors)
    releases = form.exports.releases(stage.recipe)[: len(updates) + 1]
    with stage.watch.track(f"Writing releases in {form.precision}", len(releases)) as advance:
        for number, path in enumerate(releases):
            if not path.exists():
                with stage.showing(updates[:number]) as merged:
                    content = _content(form, number, path.name, updates[:number], merged, metrics, adapted)
                    write_release(content, form.exports.graphs, path)
            advance(path.name)
    return releases


def _audit(stage: Stage, updates: list[ExpertUpdate]) -> None:
    last = stage.run.releases(stage.recipe)[len(updates)]
    stage.watch.stage(f"Exporting {last.name} afresh to compare")
    with stage.showing(updates):
        audit_reexport(
            stage.clip.model, stage.clip.preprocess.size, _context_length(stage), last, opset=stage.recipe.export.opset
        )


def _context_length(stage: Stage) -> int:
    return stage.clip.tokenize([""]).shape[1]


def _content(
    form: Form,
    number: int,
    name: str,
    updates: list[ExpertUpdate],
    merged: dict[str, np.ndarray],
    metrics: dict[str, Any],
    adapted: tuple[Rows, ...],
) -> ReleaseContent:
    """What release `number` holds, from the model that has learned `updates`."""
    stage, recipe, clip = form.stage, form.stage.recipe, form.stage.clip
    learned = {task.name for task in stage.tasks[:number]}
    tasks = tuple(
        TaskClasses(t.name, t.classes, t.templates, class_embeddings(clip, t), t.name in learned) for t in stage.tasks
    )
    values = metrics["accuracy"][number - 1] if number else metrics["zero_shot"]
    trained = dict(zip(metrics["tasks"], values, strict=True))
    return ReleaseContent(
        name=name,
        sequence=number,
        precision=form.precision,
        base=stage.run.base(),
        updates=tuple(
            {"task": t.name, "sha256": sha256_file(stage.run.task(i, t.name) / "factors.safetensors")}
            for i, t in enumerate(recipe.stream[:number], 1)
        ),
        weights=merged if form.precision == "fp32" else form.tensors(updates),
        tasks=tasks,
        golden=_golden(stage),
        preprocess=clip.preprocess.to_json(),
        tokenizer=clip.tokenizer,
        graph_digests={graph: graph_digest(form.exports.graphs / graph) for graph in GRAPHS},
        accuracy=lambda folder: trained if form.precision == "fp32" else _accuracies(stage, folder, tasks),
        versions={"r1export": __version__} | versions(),
        tolerance=form.tolerance,
        adapted=adapted,
    )


def _accuracies(stage: Stage, folder: Path, tasks: tuple[TaskClasses, ...]) -> dict[str, float]:
    """Top-1 of a release's own image tower in onnxruntime, on all test images of every task."""
    run = runner(open_session(folder / "visual.onnx"))
    union = all_classes(stage.clip, stage.tasks) if stage.recipe.data.candidates == "all" else None
    found = {}
    for task, classes in zip(stage.tasks, tasks, strict=True):
        batches = stage.tests[task.name].batches(BATCH)
        embeds = [run({"pixel_values": stage.clip.preprocess.normalize(batch).numpy()}) for batch in batches]
        found[task.name] = top1_among(np.concatenate(embeds), task, union or classes.embeddings)
    return found


@torch.inference_mode()
def _golden(stage: Stage) -> Golden:
    """Real test images of all tasks in turn, a prompt of each, and what torch makes of them."""
    clip, tasks = stage.clip, stage.tasks
    picks = [(tasks[i % len(tasks)], i // len(tasks)) for i in range(GOLDEN_IMAGES)]
    pixels = torch.cat([stage.tests[task.name].batch(np.array([place % len(task.test)])) for task, place in picks])
    tokens = clip.tokenize([task.templates[0].format(task.classes[place % len(task.classes)]) for task, place in picks])
    values = clip.preprocess.normalize(pixels)
    return Golden(
        values.numpy(),
        clip.encode_image(pixels).float().cpu().numpy(),
        tokens.cpu().numpy(),
        clip.encode_text(tokens).float().cpu().numpy(),
    )
