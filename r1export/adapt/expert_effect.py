"""Choose the experts to merge by their effect on the loss, within the bytes that k_merge experts of every layer would take.

    e_i = -sum_batches dL/dg_i    at g = 1    the first-order estimate of L without expert i minus L with it

All experts act, without dropout, on the last batches. Layers differ in what an expert costs, in + out numbers, and in what it
brings: every layer keeps its best expert, and the others are taken by effect per byte over all layers while they fit. First-order
importance as in pruning (Molchanov et al., arXiv 1906.10771, without the square: an expert that raises the loss is none to keep).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from r1export.adapt import distributed
from r1export.adapt.pool import Pools, routed
from r1export.adapt.routing import Frozen
from r1export.update.factors import Rows

Effects = Mapping[Rows, Tensor]  # by pool: float32 (r,), positive if the expert lowers the loss


def expert_effects(pools: Pools, losses: Sequence[Callable[[], Tensor]]) -> Effects:
    """The effect of every expert on the sum of `losses`, each a function that computes the loss of one batch."""
    gates = {rows: pool.lora_A.new_ones(len(pool.lora_A)).requires_grad_() for rows, pool in pools.items()}
    effects = {rows: torch.zeros_like(gate) for rows, gate in gates.items()}
    acting = {id(pool): Frozen(gates[rows]) for rows, pool in pools.items()}
    with routed(pools.values(), lambda pool: acting[id(pool)]):
        for loss in losses:
            slopes = torch.autograd.grad(loss(), list(gates.values()), materialize_grads=True)
            for effect, slope in zip(effects.values(), slopes, strict=True):
                effect -= slope
    for effect in effects.values():
        distributed.average_(effect)
    return effects


def within_bytes(pools: Pools, effects: Effects) -> dict[Rows, list[int]]:
    """The experts of each pool to keep: the best one of each, then by effect per byte while they fit."""
    sizes = {rows: pool.lora_A.shape[1] + len(pool.lora_B) for rows, pool in pools.items()}
    kept = {rows: [int(effect.argmax())] for rows, effect in effects.items()}
    left = sum(sizes[rows] * (pool.settings.k_merge - 1) for rows, pool in pools.items())
    others = [(rows, i) for rows, effect in effects.items() for i in range(len(effect)) if i not in kept[rows]]
    others.sort(key=lambda one: -effects[one[0]][one[1]].item() / sizes[one[0]])  # stable: ties go to the first layer
    for rows, i in others:
        if sizes[rows] <= left:
            kept[rows].append(i)
            left -= sizes[rows]
    return {rows: sorted(experts) for rows, experts in kept.items()}
