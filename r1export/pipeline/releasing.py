"""Write releases: the graphs once, then for the base and after every task one folder that can be deployed."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from r1export import __version__
from r1export.adapt.evaluate import class_embeddings
from r1export.errors import Unsupported
from r1export.export.audit import audit_reexport
from r1export.export.graph import GRAPHS, export_graphs
from r1export.export.preprocess import write_preprocess
from r1export.export.release import PREPROCESS, Golden, ReleaseContent, TaskClasses, refused_writes, write_release
from r1export.pipeline.environment import versions
from r1export.pipeline.stage import Stage
from r1export.run_folder import read_json
from r1export.update.factors import ExpertUpdate
from r1export.update.files import new_folder, sha256_file
from r1export.verify import proof

GOLDEN_IMAGES = 8  # images in golden.safetensors, spread over the tasks: 4.8 MB at 224 px


def export(stage: Stage, *, overwrite: bool = False, audit: bool = False) -> list[Path]:
    """Write the graphs, if they are not there, and every release that is not there; returns the release folders.

    With `audit` the merged model of the last release is exported afresh and compared with it, node by node and byte by byte.

    Raises CheckFailed if the audit finds a difference.
    """
    run, recipe = stage.run, stage.recipe
    if overwrite:
        for folder in (run.graphs, run.path / "releases"):
            shutil.rmtree(folder, ignore_errors=True)
    metrics, updates = run.metrics(), run.updates(recipe)
    with refused_writes(run.path):
        if not run.graphs.exists():
            stage.watch.stage("Exporting the graphs, once")
            with new_folder(run.graphs) as folder:
                export_graphs(
                    stage.clip.model,
                    stage.clip.preprocess.size,
                    _context_length(stage),
                    folder,
                    opset=recipe.export.opset,
                )
                _write_preprocess(stage, folder)
        releases = run.releases(recipe)[: len(updates) + 1]
        with stage.watch.track("Writing releases", len(releases)) as advance:
            for number, path in enumerate(releases):
                if not path.exists():
                    _release(stage, number, path, updates[:number], metrics)
                advance(path.name)
    if audit:
        stage.watch.stage(f"Exporting {releases[-1].name} afresh to compare")
        stage.clip.load_(stage.merged(updates))
        audit_reexport(
            stage.clip.model,
            stage.clip.preprocess.size,
            _context_length(stage),
            releases[-1],
            opset=recipe.export.opset,
        )
        stage.clip.load_(stage.base)
    return releases


def _context_length(stage: Stage) -> int:
    return stage.clip.tokenize([""]).shape[1]


def _write_preprocess(stage: Stage, folder: Path) -> None:
    """preprocess.onnx, for models whose preprocessing has a faithful graph; the others have preprocess.json alone."""
    with suppress(Unsupported):
        write_preprocess(stage.clip.preprocess.to_json(), folder / PREPROCESS, opset=stage.recipe.export.opset)


def _release(stage: Stage, number: int, path: Path, updates: list[ExpertUpdate], metrics: dict[str, Any]) -> None:
    run, recipe, clip = stage.run, stage.recipe, stage.clip
    weights = stage.merged(updates)
    clip.load_(weights)
    learned = {task.name for task in stage.tasks[:number]}
    accuracies = dict(
        zip(metrics["tasks"], metrics["accuracy"][number - 1] if number else metrics["zero_shot"], strict=True)
    )
    content = ReleaseContent(
        name=path.name,
        sequence=number,
        base=read_json(run.path / "run.json", "train the run first")["base"],
        updates=tuple(
            {"task": t.name, "sha256": sha256_file(run.task(i, t.name) / "factors.safetensors")}
            for i, t in enumerate(recipe.stream[:number], 1)
        ),
        weights=weights,
        tasks=tuple(
            TaskClasses(t.name, t.classes, t.templates, class_embeddings(clip, t), t.name in learned)
            for t in stage.tasks
        ),
        golden=_golden(stage),
        preprocess=clip.preprocess.to_json(),
        tokenizer=clip.tokenizer,
        graph_digests={graph: proof.graph_digest(run.graphs / graph) for graph in GRAPHS},
        accuracy=accuracies,
        versions={"r1export": __version__} | versions(),
        tolerance={"max_abs": recipe.verify.max_abs, "min_cosine": recipe.verify.min_cosine},
    )
    write_release(content, run.graphs, path)
    clip.load_(stage.base)


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
