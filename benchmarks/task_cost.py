"""Cost of one task: seconds of a training step times the iterations, plus the passes that are made once.

    python benchmarks/task_cost.py --classes 101 --out task.json

ViT-B/16 with random weights and QuickGELU, as OpenAI's weights have it, five random images per class, the settings that
recipes/mtil-5shot.toml uses. A task has four phases: the distillation targets, the start of the experts (directions of the
task's own images, gradient), the steps, and the directions that it protects. A few steps are timed before and after the
selection of experts is fixed, and multiplied by their numbers. Loading, decoding of files, merge and evaluation are not included.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from r1export.adapt.clip import Clip, load_clip
from r1export.adapt.distillation import distillation_targets, reference_names
from r1export.adapt.gradient_init import init_along_gradient_
from r1export.adapt.image_cache import Pixels
from r1export.adapt.inject import inject_experts_
from r1export.adapt.input_span import new_directions, own_directions, set_spans_
from r1export.adapt.trainer import TrainingTask, reset_pools_, task_prompts, train_pools_
from r1export.data.task import ImageSet, Task
from r1export.pipeline.context import pool_settings, train_settings
from r1export.pipeline.train import OWN_IMAGES
from r1export.recipe import Pool, Train

SHOTS, SIDE = 5, 224


def random_clip(name: str) -> Clip:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "random.safetensors"
        save_file(open_clip.create_model(name, load_weights=False).state_dict(), weights)
        return load_clip(name, weights=weights, quick_gelu=True)


def random_task(classes: int) -> Task:
    labels = np.repeat(np.arange(classes), SHOTS)

    def draw(i: int) -> Image.Image:
        return Image.fromarray(np.random.default_rng(i).integers(0, 256, (SIDE, SIDE, 3), np.uint8))

    images = ImageSet.drawn(labels, draw)
    return Task("random", tuple(f"thing number {i}" for i in range(classes)), ("a photo of a {}.",), images, images)


Seconds = dict[str, tuple[float, float]]  # by phase: wall clock, processor


@contextmanager
def timed(phase: str, seconds: Seconds) -> Iterator[None]:
    wall, processor = time.perf_counter(), time.process_time()
    yield
    seconds[phase] = time.perf_counter() - wall, time.process_time() - processor
    print(f"{phase}: {seconds[phase][0]:.1f} s, {seconds[phase][1]:.1f} s of the processor", flush=True)


def step_seconds(clip: Clip, training: TrainingTask, steps: int, *, fixed: bool) -> tuple[float, float]:
    """Median seconds of a step, on the clock and of the processor, with experts fixed or chosen by every batch."""
    pools = inject_experts_(clip.model, pool_settings(Pool()))
    reset_pools_(pools, 0, 1)
    settings = replace(training.settings, iterations=steps + 1, consolidate=0.0 if fixed else 1.0)
    marks: list[tuple[float, float]] = []
    train_pools_(
        clip,
        pools,
        replace(training, settings=settings),
        on_step=lambda _: marks.append((time.perf_counter(), time.process_time())),
    )
    wall, processor = np.median(np.diff(marks, axis=0), 0)
    return float(wall), float(processor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--classes", type=int, default=101)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each kind")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    clip, task, recipe = random_clip(options.model), random_task(options.classes), Train()
    training = TrainingTask(1, task, Pixels(task.train, clip.preprocess), train_settings(recipe))
    visited = training.visited()
    seconds: Seconds = {}
    with timed("distillation targets", seconds):
        targets = distillation_targets(clip, training.train, visited, reference_names())
    training = replace(training, targets=targets)
    fixed_steps = round((1 - recipe.consolidate) * recipe.iterations)
    for phase, fixed in (("a step", False), ("a step with experts fixed", True)):
        seconds[phase] = step_seconds(random_clip(options.model), training, options.steps, fixed=fixed)
        print(f"{phase}: {seconds[phase][0]:.2f} s, {seconds[phase][1]:.2f} s of the processor", flush=True)
    pools = inject_experts_(clip.model, pool_settings(Pool()))
    reset_pools_(pools, 0, 1)
    with timed("directions of the task's own images", seconds):
        set_spans_(pools, [own_directions(clip, pools, training.train, visited[:OWN_IMAGES], recipe.protect_own)])
    with timed("start along the gradient", seconds):
        init_along_gradient_(clip, pools, training)
    with timed("directions to protect", seconds):
        new_directions(clip, pools, training.train, task_prompts(clip, training), recipe.protect)
    counts = {"a step": recipe.iterations - fixed_steps, "a step with experts fixed": fixed_steps}
    total, processor = (sum(s[clock] * counts.get(phase, 1) for phase, s in seconds.items()) for clock in (0, 1))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"a task: {total / 60:.1f} min, {processor / 60:.1f} min of the processor; peak {peak:.2f} GB")
    if options.out:
        result = {"seconds": seconds, "counts": counts, "task_seconds": total, "processor_seconds": processor}
        result |= {"classes": options.classes, "threads": torch.get_num_threads(), "peak_gb": peak}
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
