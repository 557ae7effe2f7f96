"""The state that all steps of a run share: the run folder, the base model and the tasks, loaded on first use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import numpy as np
import torch

from r1export.adapt.class_prompts import check_prompts
from r1export.adapt.clip import Clip, load_clip
from r1export.adapt.frozen_start import BlockInputs, LateClip, frozen_start, late_clip
from r1export.adapt.image_cache import Images, Pixels, RandomCrop
from r1export.adapt.inject import eject_experts_, inject_experts_
from r1export.adapt.pool import Pools
from r1export.adapt.pool_settings import PoolSettings
from r1export.adapt.preprocess_settings import OPENAI, PreprocessSettings
from r1export.adapt.trainer import TrainSettings
from r1export.data.images import Decoding
from r1export.data.request import Request, expand_path
from r1export.data.sources import load_task
from r1export.data.synthetic import BUILTIN_MODELS
from r1export.data.task import Task, check_task, few_shot, readable
from r1export.errors import InputError, Unsupported
from r1export.export.tokenizer import write_tokenizer
from r1export.recipe import Pool, Recipe, TaskSource, Train
from r1export.run_folder import RunFolder
from r1export.update.container import digest
from r1export.update.factors import ExpertUpdate
from r1export.update.run_layout import TaskLayout
from r1export.verify.results import TaskInputs

Track = Callable[..., None]


class Progress(Protocol):
    """Reports the progress of a command."""

    def step(self, title: str) -> None:
        """Begin a new step."""

    def track(self, title: str, total: int) -> AbstractContextManager[Track]:
        """A progress bar: the block calls `advance(note="")` once per unit of work."""


class NoProgress:
    """Reports nothing."""

    def step(self, title: str) -> None:
        pass

    @contextmanager
    def track(self, title: str, total: int) -> Iterator[Track]:
        yield lambda note="": None


@dataclass(frozen=True)
class Learner:
    """A model and its input images by task name: `trains` of each task, `tests` of each task and the probe."""

    clip: Clip
    trains: Mapping[str, Images]
    tests: Mapping[str, Images]


@dataclass(frozen=True)
class RunContext:
    """A run, its base model and its tasks, loaded on first use."""

    run: RunFolder
    recipe: Recipe
    device: str
    progress: Progress

    @cached_property
    def clip(self) -> Clip:
        """The base model; steps that change its weights restore them."""
        self.progress.step("Loading the base model")
        clip = load_base(self.recipe, self.device)
        for note in clip.notes:
            self.progress.step(f"Base model: {note}")
        return clip

    def original(self) -> Clip:
        """The base model before its image tower was converted to its deployed form."""
        return load_base(self.recipe, self.device, deployed=False)

    @cached_property
    def base(self) -> dict[str, np.ndarray]:
        return self.clip.parameters()

    @cached_property
    def base_sha256(self) -> str:
        """Digest of the base model's parameters."""
        return digest(self.base)

    @cached_property
    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer files of a release, by name."""
        with TemporaryDirectory() as folder:
            write_tokenizer(self.clip.tokenizer, Path(folder) / "tokenizer")
            return {path.name: path.read_bytes() for path in (Path(folder) / "tokenizer").iterdir()}

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        self.progress.step("Reading the tasks")
        return tuple(self._task(source) for source in self.recipe.stream)

    @cached_property
    def probe(self) -> Task | None:
        return self._task(self.recipe.probe, test_only=True) if self.recipe.probe else None

    @cached_property
    def tests(self) -> dict[str, Pixels]:
        """Decoded test images by task name, the probe's included."""
        return {
            task.name: Pixels(task.test, self.clip.preprocess)
            for task in (*self.tasks, *((self.probe,) if self.probe else ()))
        }

    @cached_property
    def trains(self) -> dict[str, Pixels]:
        """Decoded training images by task name, randomly cropped if the recipe sets data.augment."""
        data, seed = self.recipe.data, self.recipe.train.seed
        augment = RandomCrop(seed, anew=not data.shots) if data.augment == "crop" else None
        return {task.name: Pixels(task.train, self.clip.preprocess, augment=augment) for task in self.tasks}

    @cached_property
    def learner(self) -> Learner:
        """The model and images for training and evaluation, starting at the first block with experts."""
        clip, recipe = self.clip, self.recipe
        experts = recipe.train.method == "experts"
        start = frozen_start(clip, pool_settings(recipe.pool)) if experts else None
        if start is None:
            return Learner(clip, dict(self.trains), dict(self.tests))
        trains, tests = (
            {name: BlockInputs(pixels, clip, start) for name, pixels in sets.items()}
            for sets in (self.trains, self.tests)
        )
        return Learner(late_clip(clip, start), trains, tests)

    def learner_images(self, pixels: Pixels) -> Images:
        """Images in the form in which the learner's model takes them."""
        clip = self.learner.clip
        return BlockInputs(pixels, self.clip, clip.start) if isinstance(clip, LateClip) and clip.start else pixels

    def task_layout(self, number: int) -> TaskLayout:
        """The folder of task `number`, counted from 1."""
        return self.run.task(number, self.recipe.stream[number - 1].name)

    def merged(self, updates: Sequence[ExpertUpdate]) -> dict[str, np.ndarray]:
        """All parameters after `updates`, always computed from the base."""
        return self.base | ExpertUpdate.stack(updates).apply(self.base)

    @contextmanager
    def with_updates_applied(self, updates: Sequence[ExpertUpdate]) -> Iterator[dict[str, np.ndarray]]:
        """Merge `updates` into `clip` and yield all parameters; restore the base afterwards, also after an error."""
        merged = self.merged(updates)
        self.clip.load_(merged)
        try:
            yield merged
        finally:
            self.clip.load_(self.base)

    def _task(self, source: TaskSource, *, test_only: bool = False) -> Task:
        data, seed = self.recipe.data, self.recipe.train.seed
        request = Request(
            source.source,
            expand_path(data.root) if data.root else None,
            download=data.download,
            test_only=test_only,
            skip_broken=data.skip_broken,
            decoding=Decoding(data.decode, self.clip.preprocess.fill),
        )
        task = load_task(request, name=source.name, templates=source.templates)
        if data.skip_broken:
            task = self._without_broken(task, request)
        train = task.train if test_only else few_shot(task.train, data.shots, seed)
        test = task.test
        if data.test_limit and len(test) > data.test_limit:
            test = test.subset(np.sort(np.random.default_rng(seed).permutation(len(test))[: data.test_limit]))
        return replace(task, train=train, test=test)

    def _without_broken(self, task: Task, request: Request) -> Task:
        """The task without its unreadable images, which are listed in its notes. Decodes all images once."""
        with self.progress.track(
            f"{task.name}: checking for broken images", len(task.train) + len(task.test)
        ) as advance:
            (train, bad_train), (test, bad_test) = (readable(images, advance) for images in (task.train, task.test))
        task = replace(task, train=train, test=test, notes=(*task.notes, *bad_train, *bad_test))
        check_task(task, request.source, test_only=request.test_only)
        return task


def load_base(recipe: Recipe, device: str = "cpu", *, deployed: bool = True) -> Clip:
    """The base model of a recipe, with its image tower in its `deployed` form or as stored."""
    base = recipe.base
    if base.model.startswith("builtin:"):
        name = base.model.removeprefix("builtin:")
        if name not in BUILTIN_MODELS:
            raise InputError(f"base.model: unknown built-in model {name!r}", f"known: {', '.join(BUILTIN_MODELS)}")
        files = BUILTIN_MODELS[name]
        return load_clip(
            weights=files.weights, config=files.config, preprocess=OPENAI, device=device, deployed=deployed
        )
    return load_clip(
        _expanded_model(base.model),
        pretrained=base.pretrained,
        weights=_optional_path(base.weights),
        config=_optional_path(base.config),
        tokenizer=_optional_path(base.tokenizer),
        preprocess=PreprocessSettings(base.mean, base.std, base.interpolation, base.resize_mode),
        image_size=base.image_size,
        quick_gelu=base.quick_gelu,
        device=device,
        allow_pickle=base.allow_pickle,
        deployed=deployed,
    )


def _optional_path(value: str) -> Path | None:
    return expand_path(value) if value else None


def _expanded_model(model: str) -> str:
    """The model name with `~` and variables of a `local-dir:` path expanded."""
    scheme, colon, folder = model.partition(":")
    return f"{scheme}:{expand_path(folder)}" if colon and scheme == "local-dir" else model


def choose_device(wanted: str) -> str:
    """`auto` is cuda if available. Raises Unsupported if cuda is requested and not available."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise Unsupported("no usable CUDA device", "use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def check_inputs(context: RunContext) -> None:
    """Load the model and the tasks, inject the pools and decode the images, to report bad input before anything is written.

    Image sets that don't fit in memory are decoded on use.
    """
    inject_pools_(context.clip, context.recipe)
    eject_experts_(context.clip.model)
    for task in (*context.tasks, *((context.probe,) if context.probe else ())):
        check_prompts(context.clip, task)
    if context.recipe.data.candidates == "all":
        names = dict.fromkeys(name for task in context.tasks for name in task.classes)
        check_prompts(context.clip, replace(context.tasks[0], name="all tasks together", classes=tuple(names)))
    sets = [pixels for pixels in (*context.trains.values(), *context.tests.values()) if pixels.kept]
    with context.progress.track("Decoding images", len(sets)) as advance:
        for pixels in sets:
            for _ in pixels.batches(256):
                pass
            advance(f"{len(pixels)} images")
    for found in inputs_of(context):
        for line in (
            *(f"{count} image{'s' * (count > 1)}: {change}" for change, count in found.changes.items()),
            *found.notes,
        ):
            context.progress.step(f"{found.task}: {line}")


def inputs_of(context: RunContext) -> tuple[TaskInputs, ...]:
    """What is known about the images of every task, the probe last, from those decoded so far."""
    return tuple(
        _inputs(task, [sets[task.name] for sets in (context.trains, context.tests) if task.name in sets])
        for task in (*context.tasks, *((context.probe,) if context.probe else ()))
    )


def _inputs(task: Task, sets: Sequence[Pixels]) -> TaskInputs:
    changes = Counter(change for pixels in sets for each in pixels.changes.values() for change in each)
    return TaskInputs(
        task=task.name,
        images=sum(map(len, sets)),
        decoded=sum(len(pixels.changes) for pixels in sets),
        changes=dict(sorted(changes.items())),
        notes=task.notes,
    )


def inject_pools_(clip: Clip, recipe: Recipe) -> Pools:
    """Inject the pools of the recipe into `clip.model`."""
    return inject_experts_(clip.model, pool_settings(recipe.pool))


def pool_settings(pool: Pool) -> PoolSettings:
    """The pool settings of a recipe."""
    return PoolSettings(**pool.model_dump(exclude={"factors", "past", "init"}))


def train_settings(train: Train) -> TrainSettings:
    """The training settings of a recipe."""
    return TrainSettings(**train.model_dump(include={field.name for field in fields(TrainSettings)}))
