"""What earlier tasks' inputs span, and that new experts do not read it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from settings import POOL, TRAIN

from r1export.adapt.convolution_pool import ConvolutionPool
from r1export.adapt.image_cache import Pixels
from r1export.adapt.inject import eject_experts_, inject_experts_
from r1export.adapt.input_span import (
    _directions,
    input_moments,
    new_directions,
    own_directions,
    parse_span,
    set_spans_,
    span_tensors,
)
from r1export.adapt.trainer import TrainingTask, reset_pools_, task_prompts, train_pools_
from r1export.errors import InputError

SETTINGS = replace(TRAIN, iterations=6, batch_size=8, distill_weight=0.0, learning_rate=1e-2, consolidate=0.5)


@pytest.fixture
def lesson(tiny_clip, stripes):
    """A tiny CLIP with pools, its training images and prompts."""
    pools = inject_experts_(tiny_clip.model, replace(POOL, alpha=12.0))
    training = TrainingTask(1, stripes, Pixels(stripes.train, tiny_clip.preprocess), SETTINGS)
    yield tiny_clip, pools, training
    eject_experts_(tiny_clip.model)


def span_of(lesson, share: float):
    clip, pools, training = lesson
    return new_directions(clip, pools, training.train, task_prompts(clip, training), share)


def test_experts_read_nothing_of_an_earlier_span_after_the_reset_and_after_every_step(lesson) -> None:
    clip, pools, training = lesson
    reset_pools_(pools, 0, 1)
    span = span_of(lesson, 0.7)
    set_spans_(pools, [span])
    reset_pools_(pools, 0, 2)
    worst = []

    def look(_=None) -> None:
        worst.append(max((pool.lora_A @ pool.span).abs().max().item() for pool in pools.values()))

    look()
    train_pools_(clip, pools, replace(training, number=2), on_step=look)
    assert len(worst) == 7
    assert max(worst) < 1e-6
    assert max(pool.lora_B.abs().max().item() for pool in pools.values()) > 1e-3


def test_what_a_tasks_own_images_give_before_it_is_of_the_image_tower_alone_and_beyond_earlier_spans(lesson) -> None:
    clip, pools, training = lesson
    reset_pools_(pools, 0, 1)
    earlier = span_of(lesson, 0.5)
    set_spans_(pools, [earlier])
    own = own_directions(clip, pools, training.train, np.arange(24), 0.9)
    assert {rows.parameter.partition(".")[0] for rows in own} == {"visual"}
    assert max(np.abs(columns.T @ earlier[rows]).max(initial=0) for rows, columns in own.items()) < 1e-5
    set_spans_(pools, [earlier, own])
    for rows, pool in pools.items():
        assert pool.span.shape[1] == earlier[rows].shape[1] + (own[rows].shape[1] if rows in own else 0)


def test_without_protection_experts_do_read_it(lesson) -> None:
    clip, pools, training = lesson
    reset_pools_(pools, 0, 1)
    span = span_of(lesson, 0.7)
    train_pools_(clip, pools, replace(training, number=2))
    assert max(np.abs(pool.lora_A.detach().numpy() @ span[rows]).max() for rows, pool in pools.items()) > 1e-2


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 4), st.floats(0.05, 0.99))
def test_directions_are_orthonormal_and_as_many_as_the_share_asks_for(seed: int, held: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    width = 9
    rows = rng.normal(size=(40, width)) * rng.uniform(0.01, 3, width)
    moment, span = rows.T @ rows, np.linalg.qr(rng.normal(size=(width, max(held, 1))))[0][:, :held]
    found = _directions(torch.from_numpy(moment), torch.from_numpy(span), share)
    whole = np.concatenate([span, found.astype(np.float64)], 1)
    assert np.allclose(whole.T @ whole, np.eye(whole.shape[1]), atol=1e-6)
    outside = [np.eye(width) - whole[:, :n] @ whole[:, :n].T for n in range(held, whole.shape[1] + 1)]
    energy = [1 - np.trace(rest @ moment @ rest) / np.trace(moment) for rest in outside]
    assert energy[-1] >= share - 1e-6
    assert all(value < share for value in energy[:-1])


def test_moments_are_those_of_what_goes_into_every_pool(lesson) -> None:
    clip, pools, training = lesson
    reset_pools_(pools, 0, 1)
    seen: dict = {}
    handles = [
        pool.register_forward_pre_hook(lambda _, x, rows=rows: seen.setdefault(rows, []).append(x[0].flatten(0, -2)))
        for rows, pool in pools.items()
    ]
    moments = input_moments(clip, pools, training.train, task_prompts(clip, training))
    for handle in handles:
        handle.remove()
    for rows, parts in seen.items():
        x = torch.cat(parts).double()
        assert torch.allclose(moments[rows], x.T @ x, rtol=1e-5, atol=1e-5)
    assert moments.keys() == pools.keys()


def test_pools_with_the_same_input_share_its_moments_and_directions_and_others_do_not(lesson) -> None:
    clip, pools, training = lesson
    reset_pools_(pools, 0, 1)
    prompts = task_prompts(clip, training)
    moments, span = input_moments(clip, pools, training.train, prompts), span_of(lesson, 0.7)
    packed = [rows for rows in pools if rows.parameter == "visual.transformer.resblocks.0.attn.in_proj_weight"]
    assert len(packed) == 3
    assert len({id(moments[rows]) for rows in packed}) == 1
    assert len({id(moment) for moment in moments.values()}) == len(pools) - 2 * 4, "q, k and v of four blocks"
    for rows, pool in pools.items():
        assert np.array_equal(span[rows], _directions(moments[rows], pool.span.double(), 0.7))


def test_a_pool_with_a_span_of_its_own_gets_directions_of_its_own(lesson) -> None:
    _, pools, _ = lesson
    reset_pools_(pools, 0, 1)
    q, k, v = (rows for rows in pools if rows.parameter == "visual.transformer.resblocks.0.attn.in_proj_weight")
    set_spans_(pools, [{q: span_of(lesson, 0.5)[q]}])
    span = span_of(lesson, 0.9)
    assert np.abs(span[q].T @ pools[q].span.numpy()).max() < 1e-5
    assert np.array_equal(span[k], span[v])
    assert span[q].shape[1] < span[k].shape[1]


@pytest.mark.parametrize("convolution", [torch.nn.Conv2d(3, 5, 1), torch.nn.Conv2d(3, 5, 3, stride=2, padding=1)])
def test_a_convolution_reads_its_patches(convolution) -> None:
    pool, x = ConvolutionPool(convolution, POOL), torch.randn(2, 3, 7, 6)
    torch.nn.init.normal_(pool.lora_A)
    torch.nn.init.normal_(pool.lora_B)
    weights = torch.ones(POOL.rank)
    rows = pool.reads(x) @ pool.lora_A.T @ pool.lora_B.T
    found = pool.add(x, weights).flatten(2).transpose(1, 2).flatten(0, 1)
    assert torch.allclose(rows, found, atol=1e-5)


def test_directions_survive_their_file_and_others_are_refused(lesson) -> None:
    _, pools, _ = lesson
    reset_pools_(pools, 0, 1)
    span = span_of(lesson, 0.7)
    tensors = span_tensors(span)
    assert all(np.array_equal(value, span[rows]) for rows, value in parse_span(tensors, pools, "here").items())
    name = next(iter(tensors))
    for wrong in ({}, {name: np.zeros((3, 1), np.float32)}):
        with pytest.raises(InputError, match=r"here: .*\.directions is .*expected"):
            parse_span({key: value for key, value in tensors.items() if key != name} | wrong, pools, "here")
