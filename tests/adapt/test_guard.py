"""A task's update is scaled down until the answers it costs the model are within a limit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from settings import POOL, TRAIN

from r1export.adapt.guard import HALVINGS, Answers, guard_
from r1export.adapt.image_cache import Pixels, RandomCrop
from r1export.adapt.inject import eject_experts_, inject_experts_
from r1export.adapt.pool import routed
from r1export.adapt.routing import Frozen
from r1export.adapt.trainer import TrainingTask, reset_pools_, train_pools_

NAMES = ("cat", "dog", "house", "tree", "car", "boat", "cup", "chair", "lamp", "road")


@pytest.fixture
def learned(tiny_clip, stripes):
    """A tiny CLIP with trained pools that change many of its answers, and its answers before."""
    pools = inject_experts_(tiny_clip.model, replace(POOL, rank=4, k_train=4, k_merge=2, alpha=40.0))
    reset_pools_(pools, 0, 1)
    crops = Pixels(stripes.train, tiny_clip.preprocess, augment=RandomCrop(0, area=(0.1, 0.35)))
    answers = Answers.of(tiny_clip, crops, NAMES)
    settings = replace(TRAIN, iterations=6, batch_size=8, distill_weight=0.0, learning_rate=1e-2)
    assert answers.cost(tiny_clip) == 0
    train_pools_(tiny_clip, pools, TrainingTask(1, stripes, Pixels(stripes.train, tiny_clip.preprocess), settings))
    yield tiny_clip, pools, answers
    eject_experts_(tiny_clip.model)


def cost_at(learned, scale: float) -> float:
    clip, pools, answers = learned
    with routed(pools.values(), lambda pool: Frozen(pool.frozen().gate * scale)):
        return answers.cost(clip)


def test_the_cost_is_the_probability_that_the_previous_model_gave_to_its_own_answers_and_gives_to_the_new_ones(
    learned,
) -> None:
    clip, pools, answers = learned
    with torch.no_grad(), routed(pools.values(), lambda pool: pool.frozen()):
        images, texts = clip.encode_image(next(answers.views.batches(1000))), clip.encode_text(answers.tokens)
    cost = sum(max(p) - p[(image @ texts.T).argmax()] for image, p in zip(images, answers.probabilities, strict=True))
    assert cost_at(learned, 1.0) == pytest.approx(100 * cost.item() / len(images), abs=1e-4)
    assert cost > 0


def test_within_the_limit_the_update_stays_as_it_is(learned) -> None:
    clip, pools, answers = learned
    before = [pool.lora_B.clone() for pool in pools.values()]
    whole = cost_at(learned, 1.0)
    found = guard_(clip, pools, answers, whole)
    assert (found.scale, found.whole, found.kept) == (1.0, whole, whole)
    assert all(torch.equal(pool.lora_B, b) for pool, b in zip(pools.values(), before, strict=True))


@pytest.mark.parametrize("share", [0.75, 0.25, 0.0])
def test_beyond_it_the_largest_scale_within_the_limit_is_kept(learned, share) -> None:
    clip, pools, answers = learned
    before, whole = [pool.lora_B.clone() for pool in pools.values()], cost_at(learned, 1.0)
    found = guard_(clip, pools, answers, share * whole)
    assert found.kept <= found.limit < found.whole == whole
    assert 0 <= found.scale < 1
    assert cost_at(learned, 1.0) == found.kept
    for pool, b in zip(pools.values(), before, strict=True):
        assert torch.equal(pool.lora_B, b * found.scale)
        with torch.no_grad():
            pool.lora_B.copy_(b)
    assert cost_at(learned, found.scale + 2**-HALVINGS) > found.limit
