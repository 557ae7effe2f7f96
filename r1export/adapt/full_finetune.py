"""Full fine-tuning, the baseline that needs no experts, written in their form so that it takes the same path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from torch import nn

from r1export.adapt.clip import Clip
from r1export.adapt.trainer import TrainingTask, TrainStep, train_pools_
from r1export.update.factors import ExpertUpdate, Factors, Rows


def fine_tune_(
    clip: Clip, training: TrainingTask, on_step: Callable[[TrainStep], None] = lambda step: None
) -> tuple[list[float], ExpertUpdate]:
    """Train every weight of the model on one task; the losses of all steps and what to add to the weights.

    The scale and bias of the logits stay, as they do for the experts. Raises InputError if the loss is not finite.
    """
    before = {name: value.copy() for name, value in clip.parameters().items()}
    with _trainable(clip.model):
        losses = train_pools_(clip, {}, training, on_step=on_step)
    return losses, difference(before, clip.parameters())


@contextmanager
def _trainable(model: nn.Module) -> Iterator[None]:
    parameters = [p for p in model.parameters() if p.ndim]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def difference(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> ExpertUpdate:
    """after - before as rank-1 terms, one for each column: u = the columns, v = the unit vectors.

    As large as the model. Merged by `ExpertUpdate.apply` it gives `after` up to the rounding of the difference.
    """
    factors = {}
    for name, old in before.items():
        if old.ndim and not np.array_equal(old, after[name]):
            columns = (after[name].astype(np.float64) - old).astype(np.float32).reshape(len(old), -1)
            eye = np.eye(columns.shape[1], dtype=np.float32)
            factors[Rows(name, 0, len(old))] = Factors.pack(eye, columns, 1.0)
    return ExpertUpdate(factors)
