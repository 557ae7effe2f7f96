"""Experts are merged for their effect on the loss, within the bytes that as many of every layer would take."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from adapt.random_experts import train_at_random_
from hypothesis import given, settings
from hypothesis import strategies as st
from settings import POOL, TRAIN

from r1export.adapt import distributed
from r1export.adapt.expert_effect import expert_effects, within_bytes
from r1export.adapt.image_cache import Pixels
from r1export.adapt.inject import eject_experts_, inject_experts_
from r1export.adapt.pack import load_pool_tensors_, pack_experts, pool_tensors
from r1export.adapt.pool import ExpertPool, routed
from r1export.adapt.routing import Frozen
from r1export.adapt.trainer import Objective, TrainingTask, reset_pools_, task_prompts, train_pools_
from r1export.update.factors import Rows

SETTINGS = replace(TRAIN, iterations=6, batch_size=8, distill_weight=0.0, learning_rate=1e-2)
SMALL = replace(POOL, rank=4, k_train=3, k_merge=2, alpha=4.0)


@pytest.fixture
def lesson(tiny_clip, stripes):
    """A tiny CLIP with fresh pools, and its task."""
    pools = inject_experts_(tiny_clip.model, SMALL)
    reset_pools_(pools, 0, 1)
    yield tiny_clip, pools, TrainingTask(1, stripes, Pixels(stripes.train, tiny_clip.preprocess), SETTINGS)
    eject_experts_(tiny_clip.model)


def test_the_effect_of_a_small_expert_is_what_the_loss_rises_by_without_it(lesson) -> None:
    clip, pools, training = lesson
    train_at_random_(pools)
    with torch.no_grad():
        for pool in pools.values():
            pool.lora_B.mul_(0.02)
    objective = Objective(clip, distributed.Encoders(clip), pools, task_prompts(clip, training), training)

    def loss(step: int) -> torch.Tensor:
        return objective.losses(step)[0].double()

    effects = expert_effects(pools, [partial(loss, 0), partial(loss, 1)])

    def without(rows: Rows | None, expert: int) -> float:
        def gates(pool: ExpertPool) -> Frozen:
            gate = torch.ones(4)
            if rows is not None and pool is pools[rows]:
                gate[expert] = 0
            return Frozen(gate)

        with torch.no_grad(), routed(pools.values(), gates):
            return (loss(0) + loss(1)).item()

    whole = without(None, 0)
    strongest = sorted(((abs(e.item()), rows, i) for rows, effect in effects.items() for i, e in enumerate(effect)))[
        -8:
    ]
    for size, rows, i in strongest:
        assert without(rows, i) - whole == pytest.approx(effects[rows][i].item(), rel=0.25, abs=0.02 * size), rows


class Layer(ExpertPool):
    """A pool of a layer of any size."""

    def __init__(self, inputs: int, outputs: int, k_merge: int) -> None:
        super().__init__(torch.zeros(outputs, inputs), replace(POOL, rank=6, k_train=6, k_merge=k_merge))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6),
    st.integers(1, 6),
    st.integers(0, 2**32 - 1),
)
def test_no_more_bytes_than_k_merge_of_every_layer_and_the_best_of_each(sizes, k_merge, seed) -> None:
    pools = {Rows(f"w{i}", 0, outputs): Layer(inputs, outputs, k_merge) for i, (inputs, outputs) in enumerate(sizes)}
    generator = torch.Generator().manual_seed(seed)
    effects = {rows: torch.randn(6, generator=generator) for rows in pools}
    kept = within_bytes(pools, effects)
    cost = {rows: sum(pool.lora_A.shape[1:]) + len(pool.lora_B) for rows, pool in pools.items()}
    spent = sum(cost[rows] * len(experts) for rows, experts in kept.items())
    allowed = sum(k_merge * each for each in cost.values())
    assert spent <= allowed
    for rows, experts in kept.items():
        assert effects[rows].argmax().item() in experts
        assert experts == sorted(set(experts))
        left = [e for i, e in enumerate(effects[rows].tolist()) if i not in experts]
        assert not left or max(left) <= min(
            effects[rows][experts].tolist()
        )  # within a layer the larger effect goes first
        assert not left or spent + cost[rows] > allowed  # nothing more would fit


def test_the_experts_are_chosen_once_and_are_those_that_are_packed(lesson) -> None:
    clip, pools, training = lesson
    halfway = replace(training, settings=replace(SETTINGS, consolidate=0.5))
    train_pools_(clip, pools, halfway)
    update = pack_experts(pools)
    numbers = {len(pair.v) for pair in update.factors.values()}
    assert len(numbers) > 1  # layers have different numbers of experts
    for rows, pool in pools.items():
        assert pool.selected().tolist() == pool.chosen.nonzero()[:, 0].tolist()
        assert np.array_equal(update.factors[rows].v, pool.lora_A[pool.chosen].detach().numpy())
    chosen = {rows: pool.chosen.clone() for rows, pool in pools.items()}
    tensors = {name: value.copy() for name, value in pool_tensors(pools).items()}
    reset_pools_(pools, 0, 2)
    assert not any(pool.chosen.any() for pool in pools.values())
    load_pool_tensors_(pools, tensors, "pool.safetensors")
    assert all(torch.equal(pool.chosen, chosen[rows]) for rows, pool in pools.items())


def test_without_consolidation_they_are_chosen_at_the_end(lesson) -> None:
    clip, pools, training = lesson
    train_pools_(clip, pools, replace(training, settings=replace(SETTINGS, consolidate=1.0)))
    assert all(pool.chosen.any() for pool in pools.values())


def test_by_votes_nothing_is_chosen_by_effect(tiny_clip, stripes) -> None:
    pools = inject_experts_(tiny_clip.model, replace(SMALL, select="votes"))
    reset_pools_(pools, 0, 1)
    train_pools_(tiny_clip, pools, TrainingTask(1, stripes, Pixels(stripes.train, tiny_clip.preprocess), SETTINGS))
    assert not any(pool.chosen.any() for pool in pools.values())
    assert {len(pair.v) for pair in pack_experts(pools).factors.values()} == {2}
    eject_experts_(tiny_clip.model)


def test_pools_of_older_versions_have_no_choice(lesson) -> None:
    clip, pools, training = lesson
    train_pools_(clip, pools, training)
    tensors = {name: value for name, value in pool_tensors(pools).items() if not name.endswith(".chosen")}
    load_pool_tensors_(pools, tensors, "pool.safetensors")
    assert not any(pool.chosen.any() for pool in pools.values())
    assert all(len(pool.selected()) == 2 for pool in pools.values())
