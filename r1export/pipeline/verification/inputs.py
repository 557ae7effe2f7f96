"""The inputs of verification: real test images and prompts, sampled by seed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from torch import Tensor, cat

from r1export.data.task import Task
from r1export.pipeline.context import RunContext
from r1export.update.release_layout import VISUAL
from r1export.verify.parity import Inputs
from r1export.verify.runtimes.runtime import CORES, open_session, runner

BATCH = 32  # images embedded at a time, at most: fewer keep all cores busy
SMALL = 30e6  # parameters of a model that is given all samples and images
CALIBRATION = 128  # images, and prompts, from which the input ranges of int8 are taken


def parity_inputs(context: RunContext, task: Task) -> Inputs:
    """`verify.samples` test images of the task, and as many prompts of its classes."""
    rng = np.random.default_rng(context.recipe.train.seed)
    images = np.sort(rng.permutation(len(task.test))[: sample_count(context)])
    values = context.clip.preprocess.normalize(context.tests[task.name].batch(images))
    prompts = list(islice(cycle(every_prompt(task)), len(images)))
    return Inputs(values.numpy(), context.clip.tokenize(prompts).cpu().numpy(), min(len(task.classes), len(prompts)))


def every_prompt(task: Task) -> list[str]:
    """Each class in each template: one of every class first, with the templates in turn, then the next of every class."""
    count = len(task.templates)
    return [
        task.templates[(i + turn) % count].format(name) for turn in range(count) for i, name in enumerate(task.classes)
    ]


def image_count(context: RunContext) -> int:
    """Images for the gaps and the drift: `verify.images`, or as many as models of this size are given (ViT-B: 40)."""
    return context.recipe.verify.images or _by_size(context, 32, 200)


def sample_count(context: RunContext) -> int:
    """Images, and prompts, for parity: `verify.samples`, or as many as models of this size are given (ViT-B: 16)."""
    return context.recipe.verify.samples or _by_size(context, 16, 32)


def _by_size(context: RunContext, fewest: int, most: int) -> int:
    """The number of samples: `most` for a tower of a few million parameters, fewer for large models, to bound the time."""
    parameters = sum(value.size for value in context.base.values())
    return max(fewest, min(most, int(most * SMALL / parameters)))


@dataclass(frozen=True)
class LabelledImages:
    """Pixels, uint8 (n, 3, h, w), and labels (n)."""

    pixels: Tensor
    labels: np.ndarray


def test_images(context: RunContext, task: Task) -> LabelledImages:
    """Test images of the task: `verify.images` of them."""
    chosen = np.sort(_drawn(context, task, image_count(context)))
    return LabelledImages(context.tests[task.name].batch(chosen), task.test.labels[chosen])


def accuracy_images(context: RunContext, task: Task) -> np.ndarray:
    """Which test images accuracies are measured on again: all that small models take in a second, fewer for large ones."""
    return np.sort(_drawn(context, task, _by_size(context, 64, 400)))


def calibration(context: RunContext) -> dict[str, np.ndarray]:
    """Training images of all tasks and prompts of their classes, at most CALIBRATION of each, as the towers take them."""
    rng, share = np.random.default_rng(context.recipe.train.seed), max(1, CALIBRATION // len(context.tasks))
    pixels = [
        context.trains[task.name].batch(np.sort(rng.permutation(len(task.train))[:share])) for task in context.tasks
    ]
    prompts = [task.templates[0].format(name) for task in context.tasks for name in task.classes[:share]]
    values = context.clip.preprocess.normalize(cat(pixels))
    return {"pixel_values": values.numpy(), "input_ids": context.clip.tokenize(prompts).cpu().numpy()}


def _drawn(context: RunContext, task: Task, count: int) -> np.ndarray:
    """The first `count` test images of a task in the order of the seed: a larger count has those of a smaller one."""
    return np.random.default_rng(context.recipe.train.seed).permutation(len(task.test))[:count]


class ImageEmbeddings:
    """Embeddings of test images by the image towers of releases, each computed once and used by all that ask for them."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._computed: dict[tuple[Path, str], dict[int, np.ndarray]] = {}

    def of(self, release: Path, task: Task, images: np.ndarray) -> np.ndarray:
        """Unit-norm (n, D) of the test images with these indices. Raises CheckFailed if the tower cannot be run."""
        known = self._computed.setdefault((release, task.name), {})
        missing = np.array([i for i in images if int(i) not in known], np.int64)
        if len(missing):
            values = self._embed(release, self._context.tests[task.name].batch(missing))
            known.update({int(i): value for i, value in zip(missing, values, strict=True)})
        return np.stack([known[int(i)] for i in images])

    def _embed(self, release: Path, pixels: Tensor) -> np.ndarray:
        normalize = self._context.clip.preprocess.normalize
        run = runner(open_session(release / VISUAL.graph, threads=1))
        size = min(BATCH, -(-len(pixels) // (2 * CORES)))
        with ThreadPoolExecutor(CORES) as pool:
            parts = pool.map(lambda part: run({VISUAL.input: normalize(part).numpy()}), pixels.split(size))
            return np.concatenate(list(parts))

    def gallery(self, release: Path) -> np.ndarray:
        """Unit-norm (n, D) of test images of all tasks."""
        context = self._context
        share = max(1, image_count(context) // len(context.tasks))
        return np.concatenate(
            [
                self.of(release, task, np.sort(_drawn(context, task, image_count(context)))[:share])
                for task in context.tasks
            ]
        )
