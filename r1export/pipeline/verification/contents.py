"""What a release of a run has to contain, derived from the base, the factors and the recipe, and whether it does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch.nn import LayerNorm

from r1export.pipeline.context import RunContext
from r1export.pipeline.variant import ReleaseRef
from r1export.run_folder import read_json
from r1export.update.atomic_io import sha256_file
from r1export.update.release_layout import GRAPHS, UNLISTED
from r1export.update.release_manifest import MergedUpdate, ReleaseManifest, TaskEntry
from r1export.verify import contents
from r1export.verify.contents import ClassList, Embed, attempt
from r1export.verify.golden import check_classifier, check_golden
from r1export.verify.graph_digest import graph_digest
from r1export.verify.results import Check, Contents, Verdict, overall
from r1export.verify.runtime import open_session, runner

BATCH = 64  # prompts embedded at a time
TOWER_GRAPHS = ("visual.onnx", "textual.onnx")
WEIGHTS = ("visual.safetensors", "textual.safetensors")
NOT_THE_RELEASE = "manifest and files are not those of the release, so nothing else was looked at"


def required_files(tasks: Sequence[str]) -> tuple[str, ...]:
    """The files that every release has, whatever its manifest lists."""
    classes = [f"classes/{task}.{kind}" for task in tasks for kind in ("safetensors", "json")]
    return (*GRAPHS, *WEIGHTS, "golden.safetensors", "preprocess.json", "tokenizer/tokenizer.json", *classes)


def check_manifest_and_files(release: Path, manifest: ReleaseManifest, tasks: Sequence[str], expected: dict[str, object]) -> dict[str, Check]:  # fmt: skip
    """Is it the release that was written? What fails here is not worth measuring."""
    return {
        "manifest": contents.check_manifest(manifest, expected),
        "files": contents.check_files(release, manifest, required_files(tasks), UNLISTED),
    }


def check_contents(ref: ReleaseRef, manifest: ReleaseManifest) -> Contents:
    """Everything that can be known of the contents of a run's release."""
    context, path = ref.context, ref.path
    tasks = [task.name for task in context.tasks]
    identity = check_manifest_and_files(path, manifest, tasks, expected_fields(ref))
    if overall(check.verdict for check in identity.values()) is Verdict.FAIL:
        return Contents.only(NOT_THE_RELEASE, **identity)
    parameters = ref.variant.tensors(ref.updates)
    updates = list(zip(ref.learned, ref.updates, strict=True))
    epsilons = {
        name: module.eps for name, module in context.clip.model.named_modules() if isinstance(module, LayerNorm)
    }
    classes = sum(len(task.classes) for task in context.tasks)
    return Contents(
        **identity,
        graphs=attempt(lambda: contents.check_epsilons(path, TOWER_GRAPHS, epsilons), of=len(epsilons)),
        tensors=attempt(lambda: contents.check_tensor_map(path, manifest, WEIGHTS), of=len(parameters)),
        weights=attempt(lambda: contents.check_weights(path, manifest, parameters, updates), of=len(parameters)),
        classes=attempt(lambda: _check_classes(ref), of=classes),
        classifier=attempt(lambda: check_classifier(path, tasks, parameters), of=len(tasks)),
        golden=attempt(lambda: check_golden(path, manifest), of=1),
    )


def expected_fields(ref: ReleaseRef) -> dict[str, object]:
    """The fields of a manifest that follow from the run. Accuracies of variants are measured when they are written."""
    context, variant = ref.context, ref.variant
    facts: dict[str, object] = {
        "name": ref.path.name,
        "sequence": ref.number,
        "procedure": variant.procedure,
        "precision": variant.precision,
        "base": context.run.base(),
        "updates": tuple(
            MergedUpdate(name, sha256_file(context.run.task(i, name).factors)) for i, name in enumerate(ref.learned, 1)
        ),
        "graphs": {graph: graph_digest(variant.exports.graphs / graph) for graph in GRAPHS},
        "golden": variant.tolerance,
    }
    return facts | ({"tasks": _expected_tasks(ref)} if variant.is_reference else {})


def _expected_tasks(ref: ReleaseRef) -> tuple[TaskEntry, ...]:
    accuracies = ref.context.run.metrics().after(ref.number)
    return tuple(
        TaskEntry(task.name, len(task.classes), task.name in ref.learned, accuracies[task.name])
        for task in ref.context.tasks
    )


def _check_classes(ref: ReleaseRef) -> Check:
    """Class embeddings follow from the text tower in fp32; the other precisions carry the same files."""
    tasks = ref.context.tasks
    if not ref.variant.is_reference:
        files = [f"classes/{task.name}.{kind}" for task in tasks for kind in ("safetensors", "json")]
        detail = f"the embeddings of {len(tasks)} tasks are those of the fp32 release"
        return contents.check_same_files(ref.path, ref.reference.path, files, detail)
    lists = [ClassList(task.name, task.classes, task.templates) for task in tasks]
    listed = [problem for task in lists for problem in _list_problems(ref.path, task)]
    check = contents.check_class_embeddings(
        ref.path, lists, _embedder(ref.context, ref.path), 2 * ref.variant.gate.max_abs
    )
    return (
        Check.failed("; ".join([*listed, *([check.detail] if check.verdict is Verdict.FAIL else [])]), of=check.of)
        if listed
        else check
    )


def _embedder(context: RunContext, path: Path) -> Embed:
    """Prompts -> embeddings by the release's own text tower."""
    run = runner(open_session(path / "textual.onnx"))

    def embed(prompts: list[str]) -> np.ndarray:
        tokens = context.clip.tokenize(prompts).cpu().numpy()
        return np.concatenate([run({"input_ids": tokens[i : i + BATCH]}) for i in range(0, len(tokens), BATCH)])

    return embed


def _list_problems(path: Path, expected: ClassList) -> list[str]:
    """Names and templates in classes/TASK.json that are not the task's."""
    listed = read_json(path / "classes" / f"{expected.task}.json", "export the run again")
    fields = {"classes": list(expected.classes), "templates": list(expected.templates)}
    return [
        f"classes/{expected.task}.json: other {field} than the task has"
        for field, value in fields.items()
        if listed.get(field) != value
    ]
