"""What releases are compared on: real test images and prompts, drawn by seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor, cat

from r1export.adapt.tasks import Task
from r1export.pipeline.stage import Stage
from r1export.verify.parity import Inputs
from r1export.verify.runtime import open_session, runner

BATCH = 32  # images embedded at a time


def parity_inputs(stage: Stage, task: Task) -> Inputs:
    """`verify.samples` test images of the task, and as many prompts of its classes."""
    count, rng = stage.recipe.verify.samples, np.random.default_rng(stage.recipe.train.seed)
    images = np.sort(rng.permutation(len(task.test))[:count])
    prompts = [task.templates[i % len(task.templates)].format(name) for i, name in enumerate(task.classes)][:count]
    values = stage.clip.preprocess.normalize(stage.tests[task.name].batch(images))
    return Inputs(values.numpy(), stage.clip.tokenize(prompts).cpu().numpy())


def test_images(stage: Stage, task: Task) -> tuple[Tensor, np.ndarray]:
    """`verify.images` test images of the task, uint8 (n, 3, h, w), and their labels."""
    chosen = np.sort(
        np.random.default_rng(stage.recipe.train.seed).permutation(len(task.test))[: stage.recipe.verify.images]
    )
    return stage.tests[task.name].batch(chosen), task.test.labels[chosen]


def gallery(stage: Stage, release: Path) -> np.ndarray:
    """Unit-norm embeddings (n, D) that a release gives to test images of all tasks."""
    run, share = runner(open_session(release / "visual.onnx")), max(1, stage.recipe.verify.images // len(stage.tasks))
    values = stage.clip.preprocess.normalize(cat([test_images(stage, task)[0][:share] for task in stage.tasks])).numpy()
    return np.concatenate([run({"pixel_values": values[i : i + BATCH]}) for i in range(0, len(values), BATCH)])
