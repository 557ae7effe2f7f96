"""Distillation: the predictions of the model before a task are preserved while it is trained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from settings import POOL, TRAIN

from r1export.adapt.distillation import REFERENCES, distillation_targets, reference_names
from r1export.adapt.image_cache import Pixels
from r1export.adapt.inject import eject_experts_, inject_experts_
from r1export.adapt.trainer import TrainingTask, reset_pools_, train_pools_

EVERY, NAMES = np.arange(24), reference_names()


@pytest.fixture
def train(tiny_clip, stripes) -> Pixels:
    return Pixels(stripes.train, tiny_clip.preprocess)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def now(clip, train: Pixels, targets, texts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return clip.encode_image(train.batch(EVERY)), clip.encode_text(targets.tokens[texts])


def test_the_loss_is_the_kl_divergence_of_the_two_softmaxes(tiny_clip, train) -> None:
    targets, texts = distillation_targets(tiny_clip, train, EVERY, NAMES), np.array([3, 1, 500])
    generator = torch.Generator().manual_seed(1)
    image, text = (torch.randn(n, 24, generator=generator) for n in (2, 3))
    loss = targets.loss(image, text, np.array([7, 2]), texts, torch.tensor(5.0))
    teacher = softmax(5 * targets.images.numpy()[[7, 2]] @ targets.texts.numpy()[texts].T)
    student = softmax(5 * image.numpy() @ text.numpy().T)
    assert loss.item() == pytest.approx((teacher * np.log(teacher / student)).sum() / 2, rel=1e-4)


def test_a_model_that_has_not_changed_says_what_it_said(tiny_clip, train) -> None:
    targets, scale = distillation_targets(tiny_clip, train, EVERY, NAMES), torch.tensor(100.0)
    texts = targets.draw(1)
    assert targets.loss(*now(tiny_clip, train, targets, texts), EVERY, texts, scale).item() < 1e-5


def test_the_reference_texts_are_imagenets_names_and_those_of_earlier_tasks_each_once(tiny_clip, train) -> None:
    alone, more = (
        distillation_targets(tiny_clip, train, EVERY, NAMES),
        distillation_targets(tiny_clip, train, EVERY, reference_names(("zero", "one", "goldfish"))),
    )
    assert len(alone.tokens) == 998  # two of the 1,000 are named twice
    assert len(more.tokens) == len(more.texts) == 1000
    assert torch.equal(more.tokens[-1], tiny_clip.tokenize(["a photo of a one."])[0])


def test_each_step_draws_other_texts_and_the_same_step_the_same(tiny_clip, train) -> None:
    targets = distillation_targets(tiny_clip, train, EVERY, NAMES)
    assert len(set(targets.draw(1).tolist())) == REFERENCES
    assert np.array_equal(targets.draw(1), targets.draw(1))
    assert not np.array_equal(targets.draw(1), targets.draw(2))


def test_predictions_change_less_with_distillation(tiny_clip, stripes, train) -> None:
    texts, changes = np.arange(100), []
    settings = replace(TRAIN, iterations=30, batch_size=8, learning_rate=1e-2, seed=1)
    for weight in (0.0, 5.0):
        targets = distillation_targets(tiny_clip, train, EVERY, NAMES)
        pools = inject_experts_(tiny_clip.model, replace(POOL, alpha=12.0))
        reset_pools_(pools, 1, 1)
        weighted = replace(settings, distill_weight=weight)
        train_pools_(tiny_clip, pools, TrainingTask(1, stripes, train, weighted, targets))
        for pool in pools.values():
            pool.freeze_()
        loss = targets.loss(*now(tiny_clip, train, targets, texts), EVERY, texts, torch.tensor(14.0))
        changes.append(loss.item())
        eject_experts_(tiny_clip.model)
    assert changes[1] < 0.5 * changes[0]


def test_only_images_that_steps_will_see_are_embedded(tiny_clip, stripes, train) -> None:
    settings = replace(TRAIN, iterations=2, batch_size=8, seed=1)
    images = TrainingTask(1, stripes, train, settings).visited()
    assert len(images) == 16
    norms = distillation_targets(tiny_clip, train, images, NAMES).images.norm(dim=1).numpy()
    assert np.allclose(norms[images], 1, atol=1e-5)
    assert np.count_nonzero(norms) == 16
    longer = replace(settings, iterations=3)
    assert np.array_equal(TrainingTask(1, stripes, train, longer).visited(), EVERY)
