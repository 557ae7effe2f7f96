"""Optional TensorBoard logging."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from r1export.adapt import distributed
from r1export.adapt.trainer import TrainStep
from r1export.errors import Unsupported
from r1export.pipeline.context import RunContext


@contextmanager
def step_log(context: RunContext, number: int) -> Iterator[Callable[[TrainStep], None]]:
    """Log each step of task `number`, or do nothing. Raises Unsupported if TensorBoard is enabled and not installed."""
    if not _logs(context):
        yield lambda step: None
        return
    before, size = (number - 1) * context.recipe.train.iterations, context.recipe.train.batch_size
    with _writer(context) as board:

        def log(step: TrainStep) -> None:
            values = {"loss": step.loss, "orthogonality": step.orthogonality, "distillation": step.distillation}
            values["images per second"] = size / step.seconds
            for name, value in values.items():
                board.add_scalar(f"train/{name}", value, before + step.number)

        yield log


def log_accuracies(context: RunContext, number: int, accuracies: Mapping[str, float]) -> None:
    """Log the accuracy on every task after task `number`, or do nothing."""
    if _logs(context):
        with _writer(context) as board:
            for name, value in accuracies.items():
                board.add_scalar(f"accuracy/{name}", value, number * context.recipe.train.iterations)


def _logs(context: RunContext) -> bool:
    return context.recipe.train.tensorboard and distributed.is_first()


def _writer(context: RunContext) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise Unsupported(
            "tensorboard is not installed", "pip install 'r1export[tensorboard]', or remove train.tensorboard"
        ) from None
    return SummaryWriter(str(context.run.tensorboard))
