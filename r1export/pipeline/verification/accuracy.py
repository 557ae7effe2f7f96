"""Check the claimed accuracies of a release by measuring them again with its image tower in onnxruntime."""

from __future__ import annotations

from math import sqrt

import numpy as np

from r1export.adapt.evaluate import all_classes, top1_among
from r1export.data.task import Task
from r1export.pipeline.variant import ReleaseRef
from r1export.pipeline.verification.inputs import ImageEmbeddings, accuracy_images
from r1export.update.container import read_tensors
from r1export.update.release_layout import CLASS_EMBEDS, class_embeddings_file
from r1export.update.release_manifest import ReleaseManifest
from r1export.verify.results import Check

SIGMAS = 3  # standard errors; exceeded by chance once in 370 times
FLIPS = 2  # images whose top-1 class may differ between runtimes


def check_accuracies(ref: ReleaseRef, manifest: ReleaseManifest, embeddings: ImageEmbeddings) -> Check:
    """Top-1 of every task within the error of the images that it is measured on again. Counts are tasks.

    Raises CheckFailed if the image tower cannot be run.
    """
    claimed = {task.name: task.accuracy for task in manifest.tasks}
    problems = [
        problem for task in ref.context.tasks for problem in _problems(ref, embeddings, task, claimed.get(task.name))
    ]
    count = len(ref.context.tasks)
    return Check.judge(problems, looked_at=count, of=count, detail=f"the accuracies of {count} tasks are reproduced")


def _problems(ref: ReleaseRef, embeddings: ImageEmbeddings, task: Task, claimed: float | None) -> list[str]:
    if claimed is None:
        return [f"{task.name}: the manifest has no accuracy"]
    chosen = accuracy_images(ref.context, task)
    measured = _measure(ref, embeddings.of(ref.path, task, chosen), task, chosen)
    allowed = allowed_error(claimed, len(chosen), len(task.test))
    if abs(measured - claimed) <= allowed:
        return []
    return [
        f"{task.name}: {measured:.3f} on {len(chosen)} test images, the manifest claims {claimed:.3f} (tolerance {allowed:.3f})"
    ]


def allowed_error(claimed: float, images: int, whole: int) -> float:
    """How far an accuracy on `images` of the `whole` test set may lie from the one on all of it.

    Three standard errors of a sample without replacement, and two images for answers that flip between runtimes.
    """
    missing = (whole - images) / max(1, whole - 1)
    spread = max(claimed * (1 - claimed), 1 / images)  # a claim of 0 or 1 is not certain either
    return SIGMAS * sqrt(spread / images * missing) + FLIPS / images


def _measure(ref: ReleaseRef, embeds: np.ndarray, task: Task, chosen: np.ndarray) -> float:
    context = ref.context
    tested = Task(task.name, task.classes, task.templates, task.train, task.test.subset(chosen))
    if context.recipe.data.candidates == "all":
        with context.with_updates_applied(ref.updates):
            return top1_among(embeds, tested, all_classes(context.clip, context.tasks))
    return top1_among(embeds, tested, read_tensors(ref.path / class_embeddings_file(task.name))[CLASS_EMBEDS])
