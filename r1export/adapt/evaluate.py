"""Class embeddings and zero-shot accuracy of a task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from r1export.adapt.clip import Clip
from r1export.adapt.image_cache import Images
from r1export.adapt.metrics import top1
from r1export.adapt.text_truncation import short_texts
from r1export.data.task import Task

BATCH = 128  # images or prompts encoded at a time


@torch.inference_mode()
def class_embeddings(clip: Clip, task: Task, batch: int = BATCH) -> np.ndarray:
    """Unit-norm float32 (C, D): for each class the mean of the embeddings of all its prompts, normalised again.

    `batch` prompts are encoded at a time: where texts are routed, those of a batch choose for each other.
    """
    prompts = [template.format(name) for name in task.classes for template in task.templates]
    tokens = clip.tokenize(prompts)
    with short_texts(clip.model):
        embeds = torch.cat([clip.encode_text(part) for part in tokens.split(batch)])
    means = embeds.view(len(task.classes), len(task.templates), -1).mean(1)
    return F.normalize(means, dim=-1).float().cpu().numpy()


@torch.inference_mode()
def image_embeddings(clip: Clip, pixels: Images) -> np.ndarray:
    """Unit-norm float32 (n, D)."""
    return torch.cat([clip.encode_image(batch) for batch in pixels.batches(BATCH)]).float().cpu().numpy()


def accuracy(clip: Clip, task: Task, test: Images, classes: Classes | None = None) -> float:
    """Top-1 accuracy on the task's test images among the task's own class names, or among those of several tasks."""
    candidates = class_embeddings(clip, task) if classes is None else classes
    return top1_among(image_embeddings(clip, test), task, candidates)


def top1_among(embeds: np.ndarray, task: Task, candidates: np.ndarray | Classes) -> float:
    """Top-1 of the task's test images (n, D) among the embeddings of its own classes (C, D), or among those of several tasks."""
    classes = candidates if isinstance(candidates, Classes) else Classes.of(task.classes, candidates)
    rows = np.array([classes.rows[name] for name in task.classes])
    return top1(embeds, classes.embeddings, rows[task.test.labels])


@dataclass(frozen=True)
class Classes:
    """Class embeddings (C, D) and the row of every name. A name that two tasks share, or that a probe repeats, is there once."""

    embeddings: np.ndarray
    rows: dict[str, int]

    @classmethod
    def of(cls, names: Sequence[str], embeddings: np.ndarray) -> Classes:
        """The classes with these names and embeddings (C, D); of those with the same name the first."""
        first = {name: i for i, name in reversed(list(enumerate(names)))}
        kept = sorted(first.values())
        return cls(embeddings[kept], {names[i]: row for row, i in enumerate(kept)})


def all_classes(clip: Clip, tasks: Iterable[Task]) -> Classes:
    """The classes of all tasks, each with the templates of the first task that has it: the candidates of X-TAIL."""
    several = list(tasks)
    names = [name for task in several for name in task.classes]
    return Classes.of(names, np.concatenate([class_embeddings(clip, task) for task in several]))
