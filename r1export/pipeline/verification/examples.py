"""Example test images with the predictions of the base model and of the last release."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from r1export.adapt.clip import Clip
from r1export.adapt.evaluate import class_embeddings
from r1export.data.task import Task
from r1export.pipeline.context import RunContext
from r1export.update.factors import ExpertUpdate
from r1export.verify.results import Answer, Example

COUNT = 6  # pictures of a task, drawn by seed
SIDE = 96  # pixels of a picture's longer side


def examples(context: RunContext, updates: Sequence[ExpertUpdate]) -> tuple[Example, ...]:
    """COUNT test pictures of every task, and of the probe, with both answers."""
    tasks = (*context.tasks, *((context.probe,) if context.probe else ()))
    chosen = {task.name: _draw(task, context.recipe.train.seed) for task in tasks}
    before = [_answers(context, task, chosen[task.name]) for task in tasks]
    with context.with_updates_applied(updates):
        after = [_answers(context, task, chosen[task.name]) for task in tasks]
    return tuple(
        Example(
            task=task.name,
            name=task.classes[task.test.labels[i]],
            picture=_webp(task.test.read(int(i))),
            before=left,
            after=right,
        )
        for task, lefts, rights in zip(tasks, before, after, strict=True)
        for i, left, right in zip(chosen[task.name], lefts, rights, strict=True)
    )


def _draw(task: Task, seed: int) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).permutation(len(task.test))[:COUNT])


def _answers(context: RunContext, task: Task, indices: np.ndarray) -> list[Answer]:
    shares = _probabilities(context.clip, task, context.tests[task.name].batch(indices))
    return [Answer(name=task.classes[int(row.argmax())], probability=float(row.max())) for row in shares]


@torch.inference_mode()
def _probabilities(clip: Clip, task: Task, pixels: Tensor) -> Tensor:
    """Of each class for uint8 images (n, 3, h, w): float (n, C)."""
    classes = torch.from_numpy(class_embeddings(clip, task)).to(clip.device)
    logits = clip.model.logit_scale.exp() * clip.encode_image(pixels) @ classes.T
    shares: Tensor = logits.softmax(-1)
    return shares


def _webp(image: Image.Image) -> str:
    """A small copy as a WebP file in base64."""
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    data = BytesIO()
    small.save(data, "WEBP", quality=75)
    return base64.b64encode(data.getvalue()).decode("ascii")
