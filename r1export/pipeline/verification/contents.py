"""What a release of a run has to hold, derived from the base, the factors and the recipe, and whether it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch.nn import LayerNorm

from r1export.errors import R1ExportError
from r1export.export.precision import PROCEDURES
from r1export.pipeline.context import RunContext
from r1export.pipeline.variant import Variant
from r1export.run_folder import read_json
from r1export.update.atomic_io import sha256_file
from r1export.update.container import map_tensors
from r1export.update.factors import ExpertUpdate
from r1export.update.release_layout import GRAPHS, UNLISTED
from r1export.update.release_manifest import ReleaseManifest, manifest_digest
from r1export.verify import contents, golden, graph_digest
from r1export.verify.runtime import open_session, runner

CLASSIFIER = "the logits of golden images are the scaled products of their embeddings with those of the classes"
BATCH = 64  # prompts embedded at a time


def identity(variant: Variant, number: int, path: Path, manifest: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Is it the release that the run wrote: manifest and files. What fails here is not worth measuring."""
    return own_identity(path, manifest, expected_manifest(variant, number))


def own_identity(
    path: Path, manifest: Mapping[str, Any], expected: Mapping[str, Any] | None = None
) -> dict[str, dict[str, str]]:
    """The same for a release by itself, without the facts that only its run knows."""
    try:
        ReleaseManifest.read(path)
        problems = contents.manifest_problems(manifest, expected or {}, manifest_digest(manifest))
        files = golden.changed_files(path, manifest, UNLISTED)
    except R1ExportError as error:
        problems, files = [error.message], []
    found = {
        "manifest": contents.part(
            problems, "its digest of itself fits" + (", and it says what the run says" if expected else "")
        )
    }
    return (
        found
        if problems
        else found | {"files": contents.part(files, f"{len(manifest['files'])} files as they were released, no other")}
    )


def holdings(
    variant: Variant, number: int, path: Path, manifest: Mapping[str, Any], updates: list[ExpertUpdate]
) -> dict[str, dict[str, str]]:
    """Does it hold what it has to: weights, the map of tensors, class embeddings, classifier, golden samples."""
    context, names = variant.context, [task.name for task in variant.context.tasks[:number]]
    expected = variant.tensors(updates)
    weights = contents.weight_problems(path, manifest, expected, list(zip(names, updates, strict=True)))
    weights += contents.tensor_map_problems(path, manifest)
    classes = _tried(lambda: _class_problems(variant, number, path))
    classifier = _tried(lambda: golden.classifier_problems(path, expected))
    samples = _tried(lambda: golden.golden_problems(path, manifest))
    epsilons = {
        name: module.eps for name, module in context.clip.model.named_modules() if isinstance(module, LayerNorm)
    }
    norms = _tried(
        lambda: [
            problem
            for graph in ("visual.onnx", "textual.onnx")
            for problem in contents.epsilon_problems(path / graph, epsilons)
        ]
    )
    return {
        "graphs": contents.part(norms, f"{len(epsilons)} norms have their epsilon"),
        "weights": contents.part(weights, f"{len(expected)} tensors are base + factors, bit for bit"),
        "classes": contents.part(classes, _CLASSES[variant.precision == "fp32"].format(len(context.tasks))),
        "classifier": contents.part(classifier, CLASSIFIER),
        "golden": contents.part(samples, "the stored samples are reproduced"),
    }


_CLASSES = ("the embeddings of {} tasks are those of the fp32 release", "the embeddings of {} tasks are what this text tower gives")  # fmt: skip


def _class_problems(variant: Variant, number: int, path: Path) -> list[str]:
    """Class embeddings follow from the text tower in fp32; the other precisions carry the same files."""
    context = variant.context
    if variant.precision != "fp32":
        single = Variant(context, "fp32").releases[number]
        files = [f"classes/{task.name}.{kind}" for task in context.tasks for kind in ("safetensors", "json")]
        other = [name for name in files if sha256_file(path / name) != sha256_file(single / name)]
        return [f"{name} is not that of the fp32 release" for name in other]
    tasks = [(task.name, task.classes, task.templates) for task in context.tasks]
    stale = contents.class_problems(path, tasks, _embedder(context, path), 2 * variant.gate.max_abs)
    return stale + _listed_classes(context, path)


def own_classifier(path: Path) -> dict[str, str]:
    """The classifier of a release by itself, with the scale that its weights hold."""
    return contents.part(
        _tried(lambda: golden.classifier_problems(path, map_tensors(path / "visual.safetensors"))), CLASSIFIER
    )


def _tried(look: Callable[[], list[str]]) -> list[str]:
    """The problems found, or why nothing could be looked at."""
    try:
        return look()
    except (R1ExportError, OSError, ValueError, KeyError) as error:
        return [str(error)]


def expected_manifest(variant: Variant, number: int) -> dict[str, Any]:
    """The facts of a manifest that follow from the run. Accuracies of variants are measured when they are written."""
    context, run, recipe, metrics = (
        variant.context,
        variant.context.run,
        variant.context.recipe,
        variant.context.run.metrics(),
    )
    folders = [(task.name, run.task(i, task.name)) for i, task in enumerate(recipe.stream[:number], 1)]
    learned = {name for name, _ in folders}
    facts = {
        "name": variant.releases[number].name, "sequence": number, "procedure": PROCEDURES[variant.precision], "precision": variant.precision,
        "base": asdict(run.base()),
        "updates": [{"task": name, "sha256": sha256_file(folder.factors)} for name, folder in folders],
        "graphs": {graph: graph_digest.graph_digest(variant.exports.graphs / graph) for graph in GRAPHS},
        "golden": asdict(variant.tolerance),
    }  # fmt: skip
    if variant.precision == "fp32":
        accuracies = metrics.after(number)
        facts["tasks"] = [
            {
                "name": t.name,
                "classes": len(t.classes),
                "learned": t.name in learned,
                "accuracy": accuracies.get(t.name),
            }
            for t in context.tasks
        ]
    return facts


def _embedder(context: RunContext, path: Path) -> contents.Embed:
    """Prompts -> embeddings by the release's own text tower."""
    run = runner(open_session(path / "textual.onnx"))

    def embed(prompts: list[str]) -> np.ndarray:
        tokens = context.clip.tokenize(prompts).cpu().numpy()
        return np.concatenate([run({"input_ids": tokens[i : i + BATCH]}) for i in range(0, len(tokens), BATCH)])

    return embed


def _listed_classes(context: RunContext, path: Path) -> list[str]:
    """Names and templates in classes/TASK.json that are not the task's."""
    problems = []
    for task in context.tasks:
        listed = read_json(path / "classes" / f"{task.name}.json", "export the run again")
        for key, value in (("classes", list(task.classes)), ("templates", list(task.templates))):
            if listed.get(key) != value:
                problems.append(f"classes/{task.name}.json: other {key} than the task has")
    return problems
