"""Train the pools on one task. Every random choice is a function of (seed, task, step), so a resumed run is the same run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r1export.adapt import distributed
from r1export.adapt.class_token import class_token_only
from r1export.adapt.clip import Clip
from r1export.adapt.distillation import DistillationTargets
from r1export.adapt.expert_effect import expert_effects, within_bytes
from r1export.adapt.image_cache import Images
from r1export.adapt.losses import in_batch_loss, orthogonality_loss
from r1export.adapt.pack import load_pool_tensors_, pool_tensors
from r1export.adapt.pool import Pools
from r1export.adapt.routing import Frozen
from r1export.adapt.text_truncation import short_texts
from r1export.data.task import Task
from r1export.errors import InputError
from r1export.update.container import read_tensors, write_tensors

EFFECT_BATCHES = 4  # before the choice of experts
SHRINK = 0.005  # largest soft threshold on a sparse gate, arXiv 2412.01004


@dataclass(frozen=True)
class TrainSettings:
    """Optimisation of one task: AdamW with a cosine schedule.

    After the share `consolidate` of `iterations` the experts with the most votes are fixed and trained on alone.
    `precision` "bf16" is autocast; experts stay in float32. A checkpoint is written every `checkpoint_every` steps.
    """

    iterations: int
    batch_size: int
    learning_rate: float
    min_learning_rate: float
    weight_decay: float
    loss: Literal["in-batch", "all-classes"]
    orthogonality: Literal["output", "none"]
    orthogonality_weight: float
    distill_weight: float
    precision: Literal["fp32", "bf16"]
    consolidate: float
    checkpoint_every: int
    seed: int


@dataclass(frozen=True)
class TrainStep:
    """What one step reports: the supervised loss, the weighted losses of orthogonality and distillation, its time in seconds."""

    number: int
    loss: float
    orthogonality: float
    distillation: float
    seconds: float


@dataclass
class _Progress:
    """What a checkpoint holds besides the tensors of the pools."""

    step: int = 0
    losses: list[float] = field(default_factory=list)

    def add(self, loss: float, task: Task) -> None:
        """One more step. Raises InputError if its loss is not finite."""
        self.step += 1
        self.losses.append(loss)
        if not math.isfinite(loss):
            raise InputError(f"task {task.name}: the loss is {loss} at step {self.step}", "lower train.learning_rate")


def seed_of(seed: int, *path: int) -> int:
    """An independent 63-bit seed for each path of small integers below `seed`."""
    return int(
        np.random.SeedSequence([seed, *path]).generate_state(2, np.uint32).astype(np.uint64)
        @ np.array([1, 1 << 31], np.uint64)
    )


def reset_pools_(pools: Pools, seed: int, task: int) -> None:
    """Fresh experts for task number `task`."""
    generator = torch.Generator().manual_seed(seed_of(seed, task, 0))
    for pool in pools.values():
        pool.reset_(generator)


def batch_indices(images: int, batch_size: int, step: int, seed: int, task: int) -> np.ndarray:
    """The images of one step, int64 (batch,): shuffled epochs one after the other, a batch may span two."""
    size = min(batch_size, images)
    places = np.arange(step * size, (step + 1) * size)
    epochs = {
        e: np.random.default_rng(seed_of(seed, task, 1, e)).permutation(images)
        for e in set((places // images).tolist())
    }
    return np.array([epochs[n // images][n % images] for n in places.tolist()])


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Cosine from `learning_rate` at step 0 to `min_learning_rate` at the last."""
    share = (1 + math.cos(math.pi * step / settings.iterations)) / 2
    return settings.min_learning_rate + (settings.learning_rate - settings.min_learning_rate) * share


@dataclass(frozen=True)
class TrainingTask:
    """Task `number` (from 1) as it is trained: its training images, the settings, and the distillation targets if any."""

    number: int
    task: Task
    train: Images
    settings: TrainSettings
    targets: DistillationTargets | None = None

    def seed(self, *path: int) -> int:
        """An independent seed for each path, of this task alone."""
        return seed_of(self.settings.seed, self.number, *path)

    def batch(self, step: int) -> np.ndarray:
        """The images of one step, int64 (batch,)."""
        return batch_indices(len(self.train), self.settings.batch_size, step, self.settings.seed, self.number)

    def visited(self) -> np.ndarray:
        """The images of all steps, ascending int64."""
        images, settings = len(self.train), self.settings
        if images <= settings.iterations * settings.batch_size:
            return np.arange(images)
        return np.unique(np.concatenate([self.batch(step) for step in range(settings.iterations)]))


def train_pools_(
    clip: Clip,
    pools: Pools,
    training: TrainingTask,
    *,
    checkpoint: Path | None = None,
    on_step: Callable[[TrainStep], None] = lambda step: None,
) -> list[float]:
    """Train the pools on a task and return the supervised loss of every step.

    `clip.model` carries the pools; nothing else of it changes. Without pools, what requires a gradient is trained.
    With `checkpoint`, the state is written there every `checkpoint_every` steps, read if the file exists, and removed at the end.

    Raises InputError if the loss is not finite or the checkpoint is damaged.
    """
    settings = training.settings
    learned = [p for pool in pools.values() for p in pool.parameters()]
    learned = learned or [p for p in clip.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    objective = Objective(clip, distributed.encoders(clip, pools), pools, task_prompts(clip, training), training)
    progress = _Progress()
    if checkpoint is not None and checkpoint.exists():
        progress = _load_checkpoint_(checkpoint, pools, optimizer)
    with _in_training(clip, list(pools.values()) or [clip.model]):
        while progress.step < settings.iterations:
            on_step(_train_step_(objective, optimizer, progress))
            if checkpoint is not None and progress.step % settings.checkpoint_every == 0 and distributed.is_first():
                _write_checkpoint(checkpoint, pools, optimizer, progress)
        _select_(objective, progress.step)
    distributed.wait()
    if checkpoint is not None and distributed.is_first():
        checkpoint.unlink(missing_ok=True)
    return progress.losses


def _train_step_(objective: Objective, optimizer: torch.optim.Optimizer, progress: _Progress) -> TrainStep:
    """One step of the optimizer. Raises InputError if the loss is not finite."""
    started, settings, pools = time.perf_counter(), objective.training.settings, objective.pools
    if progress.step >= settings.consolidate * settings.iterations:
        _consolidate_(objective, progress.step)
    losses = objective.losses(progress.step)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(progress.step, settings)
    optimizer.zero_grad()
    torch.stack(losses).sum().backward()
    optimizer.step()
    for pool in pools.values():
        pool.leave_span_()
    _shrink_(pools, progress.step / settings.iterations)
    loss, orthogonality, distillation = (value.item() for value in losses)
    progress.add(loss, objective.training.task)
    return TrainStep(progress.step, loss, orthogonality, distillation, time.perf_counter() - started)


@contextmanager
def _in_training(clip: Clip, learners: Iterable[nn.Module]) -> Iterator[None]:
    """Only what learns is in training mode: BatchNorm and DropPath of a frozen base stay as they are deployed."""
    for module in learners:
        module.train()
    try:
        yield
    finally:
        clip.model.eval()


def _consolidate_(objective: Objective, step: int) -> None:
    """Fix the experts, so that from here on the function that is trained is the one that will be merged."""
    if any(isinstance(pool.routing, Frozen) for pool in objective.pools.values()):
        return
    _select_(objective, step)
    for pool in objective.pools.values():
        pool.freeze_()


def _select_(objective: Objective, step: int) -> None:
    """Choose the experts with the largest effect on the batches before `step`, if they are to be chosen so; once, also in a resumed run.

    Before the first step none has an effect, and votes decide.
    """
    pools = {rows: pool for rows, pool in objective.pools.items() if pool.settings.select == "effect"}
    pools = {rows: pool for rows, pool in pools.items() if pool.settings.gate == "binary"}
    if not step or not pools or any(pool.chosen.any() for pool in pools.values()):
        return
    alone = replace(objective, encode=distributed.Encoders(objective.clip))

    def loss(step: int) -> Tensor:
        supervised, _, distillation = alone.losses(step)
        return supervised + distillation

    batches = range(max(0, step - EFFECT_BATCHES), step)
    for rows, experts in within_bytes(pools, expert_effects(pools, [partial(loss, step) for step in batches])).items():
        pools[rows].choose_(experts)


def _shrink_(pools: Pools, share: float) -> None:
    """Sparse gates, until they are fixed: a soft threshold that rises from 0 to SHRINK over the last half of the task."""
    for pool in pools.values():
        if pool.settings.gate == "sparse" and not isinstance(pool.routing, Frozen) and share > 0.5:
            pool.shrink_(SHRINK * (2 * share - 1))


def task_prompts(clip: Clip, training: TrainingTask) -> Tensor:
    """One prompt per class, int64 (C, L): a task is trained with one of its templates, drawn at random."""
    task, rng = training.task, np.random.default_rng(training.seed(3))
    template = task.templates[rng.integers(len(task.templates))]
    return clip.tokenize([template.format(name) for name in task.classes])


@dataclass(frozen=True)
class Objective:
    """What stays the same over the steps of one task, and the losses of a step."""

    clip: Clip
    encode: nn.Module
    pools: Pools
    prompts: Tensor
    training: TrainingTask

    def losses(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """The supervised loss and the weighted losses of orthogonality and distillation, float32 scalars."""
        training, settings = self.training, self.training.settings
        torch.manual_seed(training.seed(2, step))  # dropout
        parts = distributed.shares(training.batch(step))
        pixels, images = training.train.batch(distributed.own(parts), step), np.concatenate(parts)
        with torch.autocast(self.clip.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            supervised, distillation = self._contrast(pixels, images, training.seed(4, step))
        orthogonality = supervised.new_zeros(())
        if training.number > 1 and self.pools and settings.orthogonality != "none":
            orthogonality = orthogonality_loss(self.pools.values()) * settings.orthogonality_weight
        return supervised, orthogonality, distillation

    def _contrast(self, pixels: Tensor, images: np.ndarray, seed: int) -> tuple[Tensor, Tensor]:
        """The losses between images and texts. Each class is encoded once, however many images share it: those of the
        batch, or all of the task."""
        targets, settings = self.training.targets, self.training.settings
        labels = torch.from_numpy(self.training.task.train.labels[images]).to(self.clip.device)
        all_classes = settings.loss == "all-classes"
        present, positions = (slice(None), labels) if all_classes else labels.unique(return_inverse=True)
        classes, drawn = self.prompts[present], np.zeros(0, np.int64)
        tokens = classes
        if targets is not None:
            drawn = targets.draw(seed)
            tokens = torch.cat([classes, targets.tokens[drawn]])
        with short_texts(self.clip.model), class_token_only(self.clip.model):
            image, text = self.encode(pixels, tokens)
        image, scale = distributed.gathered(image), self.clip.model.logit_scale.exp()
        logits = (scale * image @ text[: len(classes)].T).float()
        supervised = (F.cross_entropy if all_classes else in_batch_loss)(logits, positions)
        if targets is None:
            return supervised, supervised.new_zeros(())
        divergence = targets.loss(image, text[len(classes) :], images, drawn, scale)
        return supervised, settings.distill_weight * divergence


def _write_checkpoint(path: Path, pools: Pools, optimizer: torch.optim.Optimizer, progress: _Progress) -> None:
    state = optimizer.state_dict()["state"]
    tensors = {
        f"optimizer.{i}.{name}": value.cpu().numpy() for i, slot in state.items() for name, value in slot.items()
    }
    losses = np.array(progress.losses, np.float64)
    write_tensors(path, {"losses": losses, **pool_tensors(pools), **tensors})


def _load_checkpoint_(path: Path, pools: Pools, optimizer: torch.optim.Optimizer) -> _Progress:
    """Raises InputError if the checkpoint is damaged."""
    tensors = read_tensors(path)
    load_pool_tensors_(pools, tensors, str(path))
    try:
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, i, slot = name.split(".")
                slots.setdefault(int(i), {})[slot] = torch.from_numpy(value)
        optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
        losses = tensors["losses"].tolist()
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: corrupted: {error}", "delete it to restart the task") from error
    return _Progress(len(losses), losses)
