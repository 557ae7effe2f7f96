"""Start the experts of a task along its gradient: they read the directions in which the task's loss is steepest.

    G = dL/dW    summed over the first batches of the task, experts adding nothing (B = 0), no dropout    (out, in)
    G (I - M M^T) = U diag(s) V^T,  s descending,  M the protected directions (input_span.py)
    a_i = v_i / sqrt(3)    for i = 1 ... rank: the mean square norm that random rows have

A random row reads mostly what a task does not need, the more so where the leading directions are protected. B starts at zero,
so a new pool still changes nothing. G is that of the task loss alone: the gradient of the distillation loss is zero before the
first step. Sources: LoRA-GA (arXiv 2407.05000), and KeepLoRA (2601.19659), which projects the gradient as here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from r1export.adapt import distributed
from r1export.adapt.clip import Clip
from r1export.adapt.pool import ExpertPool, Pools, routed
from r1export.adapt.trainer import Objective, TrainingTask, task_prompts
from r1export.update.factors import Rows

BATCHES = 8  # of a task, or all of its images if they are fewer
OVERSAMPLED = 8  # directions computed beyond those that are used, which makes the last ones exact enough
NEGLIGIBLE = 1e-4  # of the largest singular value: below it a direction is rounding

Gradients = dict[Rows, Tensor]  # by pool: dL/dW (out, in), float32
Calls = list[tuple[Rows, Tensor, Tensor]]  # of pools in one forward pass: pool, input, output


def init_along_gradient_(clip: Clip, pools: Pools, training: TrainingTask) -> None:
    """Let the experts of fresh pools read the leading directions of the gradient of the task's loss, the first expert the first.

    Where the gradient has fewer directions than there are experts, the others stay as they are. Takes a forward and a backward
    pass over at most BATCHES batches, and memory for the gradients of the adapted weights.
    """
    gradients = weight_gradients(clip, pools, training)
    torch.manual_seed(training.seed(6))  # svd_lowrank begins with random directions
    for rows, pool in pools.items():
        pool.read_along_(_directions(gradients[rows], pool))
        pool.leave_span_()  # of rounding


def weight_gradients(clip: Clip, pools: Pools, training: TrainingTask) -> Gradients:
    """The gradient of the task's loss with respect to the weight under every pool, summed over the batches.

    The pools have to add nothing yet: it is the gradient of the model without them.
    """
    alone = replace(training, targets=None, settings=replace(training.settings, orthogonality="none"))
    objective = Objective(clip, distributed.Encoders(clip), pools, task_prompts(clip, training), alone)
    gradients = {rows: pool.lora_A.new_zeros(len(pool.lora_B), pool.lora_A.shape[1]) for rows, pool in pools.items()}
    clip.model.eval()
    with routed(pools.values(), lambda pool: pool.frozen()):
        for step in range(min(BATCHES, -(-len(training.train) // training.settings.batch_size))):
            with _calls(pools) as calls:
                loss = objective.losses(step)[0]
            outputs = torch.autograd.grad(loss, [output for _, _, output in calls], materialize_grads=True)
            for (rows, x, _), grad in zip(calls, outputs, strict=True):
                gradients[rows] += pools[rows].writes(grad).float().T @ pools[rows].reads(x).float()
    for gradient in gradients.values():
        distributed.average_(gradient)
    return gradients


@contextmanager
def _calls(pools: Pools) -> Iterator[Calls]:
    """Within it what enters and leaves every pool is noted."""
    calls: Calls = []

    def watch(rows: Rows, pool: ExpertPool) -> torch.utils.hooks.RemovableHandle:
        def note(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            calls.append((rows, inputs[0].detach(), output))

        return pool.register_forward_hook(note)

    handles = [watch(rows, pool) for rows, pool in pools.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _directions(gradient: Tensor, pool: ExpertPool) -> Tensor:
    """At most `rank` leading right singular vectors of `gradient` (out, in) outside of the pool's span, as rows (k, in).

    The largest entry of each is positive: without a rule the sign would depend on rounding.
    """
    outside = gradient - (gradient @ pool.span) @ pool.span.T
    rank = pool.settings.rank
    _, values, vectors = torch.svd_lowrank(outside, q=min(rank + OVERSAMPLED, *outside.shape), niter=3)
    leading = vectors[:, :rank][:, values[:rank] > NEGLIGIBLE * values[0]].T
    return leading * leading.gather(1, leading.abs().argmax(1, keepdim=True)).sign()
