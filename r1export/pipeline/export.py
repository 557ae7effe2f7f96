"""Write releases: export the graphs once, then write one deployable folder for the base and after every task."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from r1export import __version__
from r1export.adapt.evaluate import all_classes, class_embeddings, top1_among
from r1export.errors import Unsupported
from r1export.export.audit import audit_reexport
from r1export.export.graph import export_graphs
from r1export.export.int8 import calibrate
from r1export.export.precision import WRITERS
from r1export.export.preprocess import write_preprocess
from r1export.export.static import static_graphs
from r1export.export.write_release import ReleaseContent, TaskClasses, refused_writes, write_release
from r1export.pipeline.context import RunContext
from r1export.pipeline.environment import versions
from r1export.pipeline.golden import GoldenInputs, golden_inputs, golden_samples, golden_texts
from r1export.pipeline.variant import Variant
from r1export.pipeline.verification.inputs import BATCH, calibration
from r1export.update.atomic_io import new_folder, sha256_file, write_json
from r1export.update.factors import ExpertUpdate
from r1export.update.release_layout import PREPROCESS_GRAPH, VISUAL
from r1export.update.release_manifest import MergedUpdate
from r1export.update.run_layout import FP32
from r1export.verify.graph_digest import graph_digests
from r1export.verify.runtimes.runtime import open_session, runner


def export_releases(context: RunContext, *, overwrite: bool = False, audit: bool = False) -> list[Path]:
    """Write the missing graphs and releases in every precision of the recipe; returns the release folders.

    With `audit` the merged model of the last release is re-exported and compared with it, node by node and byte by byte.

    Raises CheckFailed if the audit finds a difference.
    """
    run, recipe = context.run, context.recipe
    if overwrite:
        for folder in (run.graphs(), run.variant().releases_folder, run.variants_folder):
            shutil.rmtree(folder, ignore_errors=True)
    updates, releases = run.updates(recipe), []
    prompts = _Prompts(context, tuple(updates))
    with refused_writes(run.path):
        for precision in ("fp32", *recipe.export.variants):
            variant = Variant(context, precision)
            if not variant.exports.graphs.exists():
                context.progress.step(f"Exporting the {precision} graphs (once)")
                with new_folder(variant.exports.graphs) as folder:
                    _write_graphs(variant, folder)
            releases += _write_releases(variant, updates, prompts)
    if audit:
        _audit(context, updates)
    return releases


def _write_graphs(variant: Variant, folder: Path) -> None:
    context, source = variant.context, variant.context.run.graphs()
    if variant.precision == FP32:
        opset, preprocess = context.recipe.export.opset, context.clip.preprocess
        export_graphs(context.clip.model, preprocess.size, _context_length(context), folder, opset=opset)
        with suppress(
            Unsupported
        ):  # some preprocessing can't be expressed exactly as a graph; preprocess.json describes it
            write_preprocess(preprocess.to_json(), folder / PREPROCESS_GRAPH, opset=opset)
        if batch := context.recipe.export.static_batch:
            static_graphs(folder, batch)
        return
    WRITERS[variant.precision](source, folder)
    if (source / PREPROCESS_GRAPH).exists():
        shutil.copyfile(source / PREPROCESS_GRAPH, folder / PREPROCESS_GRAPH)
    if variant.precision == "int8":
        ranges = calibrate(context.run.release(0), calibration(context))
        write_json(folder / variant.exports.ranges.name, {name: list(ends) for name, ends in ranges.items()})


@dataclass(frozen=True)
class _Texts:
    """Text embeddings: of the class lists of all tasks, each (C, D), and of the golden prompts (n, D)."""

    classes: tuple[np.ndarray, ...]
    golden: np.ndarray


@dataclass(frozen=True)
class _Prompts:
    """The texts of all releases of a run with `updates`, encoded once if no update changes the text tower."""

    context: RunContext
    updates: tuple[ExpertUpdate, ...]

    @cached_property
    def golden(self) -> GoldenInputs:
        return golden_inputs(self.context)

    def encoded(self) -> _Texts:
        """By the model with its current updates."""
        changes = any(not name.startswith("visual.") for update in self.updates for name in update.parameters)
        return self._encode() if changes else self._of_all

    @cached_property
    def _of_all(self) -> _Texts:
        return self._encode()

    def _encode(self) -> _Texts:
        clip = self.context.clip
        classes = tuple(class_embeddings(clip, task) for task in self.context.tasks)
        return _Texts(classes, golden_texts(self.context, self.golden))


def _write_releases(variant: Variant, updates: list[ExpertUpdate], prompts: _Prompts) -> list[Path]:
    context, releases = variant.context, variant.releases[: len(updates) + 1]
    with context.progress.track(f"Writing {variant.precision} releases", len(releases)) as advance:
        for number, path in enumerate(releases):
            if not path.exists():
                with context.with_updates_applied(updates[:number]) as merged:
                    write_release(_content(variant, number, prompts, merged), variant.exports.graphs, path)
            advance(path.name)
    return releases


def _audit(context: RunContext, updates: list[ExpertUpdate]) -> None:
    last = Variant(context, FP32).releases[len(updates)]
    context.progress.step(f"Re-exporting {last.name} for the audit")
    size, opset = context.clip.preprocess.size, context.recipe.export.opset
    with context.with_updates_applied(updates):
        audit_reexport(context.clip.model, size, _context_length(context), last, opset=opset)


def _context_length(context: RunContext) -> int:
    return context.clip.tokenize([""]).shape[1]


def _content(variant: Variant, number: int, prompts: _Prompts, merged: dict[str, np.ndarray]) -> ReleaseContent:
    """The content of release `number`; the model currently computes with the parameters `merged`."""
    context, clip = variant.context, variant.context.clip
    trained, texts, updates = context.recipe.stream[:number], prompts.encoded(), prompts.updates
    tasks = tuple(
        TaskClasses(t.name, t.classes, t.templates, embeddings, i <= number)
        for i, (t, embeddings) in enumerate(zip(context.tasks, texts.classes, strict=True), 1)
    )
    single = variant.precision == FP32
    return ReleaseContent(
        name=variant.releases[number].name,
        sequence=number,
        precision=variant.precision,
        base=context.run.base(),
        updates=tuple(
            MergedUpdate(task.name, sha256_file(context.run.task(i, task.name).factors))
            for i, task in enumerate(trained, 1)
        ),
        weights=merged if single else variant.tensors(updates[:number]),
        tasks=tasks,
        golden=golden_samples(context, prompts.golden, texts.golden),
        preprocess=clip.preprocess.to_json(),
        tokenizer=clip.tokenizer,
        graph_digests=graph_digests(variant.exports.graphs),
        accuracy=lambda folder: context.run.metrics().after(number) if single else _accuracies(context, folder, tasks),
        versions={"r1export": __version__} | versions(),
        tolerance=variant.tolerance,
        adapted=tuple(ExpertUpdate.stack(updates).factors),
        model_config=clip.to_open_clip_config(),
    )


def _accuracies(context: RunContext, folder: Path, tasks: tuple[TaskClasses, ...]) -> dict[str, float]:
    """Top-1 accuracy of a release's image tower in onnxruntime, on all test images of every task."""
    run = runner(open_session(folder / VISUAL.graph))
    union = all_classes(context.clip, context.tasks) if context.recipe.data.candidates == "all" else None
    accuracies = {}
    for task, classes in zip(context.tasks, tasks, strict=True):
        batches = context.tests[task.name].batches(BATCH)
        embeds = [run({VISUAL.input: context.clip.preprocess.normalize(batch).numpy()}) for batch in batches]
        candidates = classes.embeddings if union is None else union
        accuracies[task.name] = top1_among(np.concatenate(embeds), task, candidates)
    return accuracies
