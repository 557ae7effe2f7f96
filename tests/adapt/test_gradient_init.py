"""Experts that start along the gradient of a task's loss."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from settings import POOL, TRAIN

from r1export.adapt import distributed, gradient_init
from r1export.adapt.convolution_pool import ConvolutionPool
from r1export.adapt.gradient_init import init_along_gradient_, weight_gradients
from r1export.adapt.image_cache import Pixels
from r1export.adapt.inject import eject_experts_, inject_experts_
from r1export.adapt.input_span import own_directions, set_spans_
from r1export.adapt.trainer import Objective, TrainingTask, reset_pools_, task_prompts, train_pools_

SETTINGS = replace(TRAIN, iterations=6, batch_size=8, distill_weight=0.0)


@pytest.fixture
def lesson(tiny_clip, stripes):
    """A tiny CLIP with fresh pools, which add to its weights at full scale, and its task."""
    pools = inject_experts_(tiny_clip.model, replace(POOL, rank=4, k_train=4, k_merge=2, alpha=4.0))
    reset_pools_(pools, 0, 1)
    yield tiny_clip, pools, TrainingTask(1, stripes, Pixels(stripes.train, tiny_clip.preprocess), SETTINGS)
    eject_experts_(tiny_clip.model)


def test_gradients_are_those_of_the_weights_themselves(lesson, monkeypatch) -> None:
    clip, pools, training = lesson
    monkeypatch.setattr(gradient_init, "BATCHES", 2)
    found = weight_gradients(clip, pools, training)
    weights = {name.replace(".base.", "."): p for name, p in clip.model.named_parameters() if p.ndim > 1}
    for weight in weights.values():
        weight.requires_grad_(True)
    objective = Objective(clip, distributed.Encoders(clip), pools, task_prompts(clip, training), training)
    for step in range(2):
        objective.losses(step)[0].backward()
    for rows, gradient in found.items():
        expected = weights[rows.parameter].grad[rows.start : rows.stop]
        assert torch.allclose(gradient, expected.flatten(1), rtol=1e-3, atol=1e-5 * expected.abs().max().item()), rows
        assert expected.abs().max() > 0


def test_experts_read_the_leading_directions_outside_of_what_is_protected_and_add_nothing_yet(lesson) -> None:
    clip, pools, training = lesson
    set_spans_(pools, [own_directions(clip, pools, training.train, np.arange(16), 0.7)])
    init_along_gradient_(clip, pools, training)
    for rows, gradient in weight_gradients(clip, pools, training).items():
        pool = pools[rows]
        outside = gradient - (gradient @ pool.span) @ pool.span.T
        values = torch.linalg.svdvals(outside)[:4]
        held = (outside @ pool.lora_A.T).norm(dim=0) * 3**0.5
        counts = values > 1e-2 * values[0]
        assert torch.allclose(held[counts], values[counts], rtol=1e-3), rows
        assert not pool.span.numel() or (pool.lora_A @ pool.span).abs().max() < 1e-6
        assert not pool.lora_B.any()


def test_experts_beyond_the_directions_of_the_gradient_stay_random(lesson) -> None:
    clip, pools, training = lesson
    pool = next(iter(pools.values()))
    basis = torch.linalg.qr(torch.randn(pool.lora_A.shape[1], pool.lora_A.shape[1]))[0]
    pool.set_span_(basis[:, :-2])  # leaves two directions for four experts
    pool.leave_span_()
    before = pool.lora_A.detach().clone()
    init_along_gradient_(clip, pools, training)
    assert torch.allclose(pool.lora_A[:2].norm(dim=1), torch.full((2,), 3**-0.5), atol=1e-5)
    assert torch.allclose(pool.lora_A[2:], before[2:], atol=1e-6)


def test_the_loss_falls_faster_than_from_random_experts(lesson) -> None:
    clip, pools, training = lesson
    random = train_pools_(clip, pools, training)
    reset_pools_(pools, 0, 1)
    init_along_gradient_(clip, pools, training)
    along = train_pools_(clip, pools, training)
    assert along[0] == pytest.approx(random[0])
    assert along[-1] < random[-1] - 0.1 * (random[0] - random[-1])


def test_it_is_the_same_each_time(lesson) -> None:
    clip, pools, training = lesson
    init_along_gradient_(clip, pools, training)
    first = {rows: pool.lora_A.detach().clone() for rows, pool in pools.items()}
    reset_pools_(pools, 0, 1)
    init_along_gradient_(clip, pools, training)
    assert all(torch.equal(pool.lora_A, first[rows]) for rows, pool in pools.items())


@pytest.mark.parametrize("convolution", [torch.nn.Conv2d(3, 5, 1), torch.nn.Conv2d(3, 5, 3, stride=2, padding=1)])
def test_what_a_convolution_reads_and_writes_gives_its_gradient(convolution) -> None:
    pool, x = ConvolutionPool(convolution, POOL), torch.randn(2, 3, 7, 6)
    y = convolution(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    product = pool.writes(grad).T @ pool.reads(x)
    assert torch.allclose(product, convolution.weight.grad.flatten(1), atol=1e-4)
