"""Training: it learns, it repeats, it resumes."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from settings import POOL, TRAIN
from torch import nn

from r1export.adapt.distillation import distillation_targets, reference_names
from r1export.adapt.evaluate import accuracy
from r1export.adapt.image_cache import Pixels
from r1export.adapt.inject import eject_experts_, inject_experts_
from r1export.adapt.pack import pack_experts, pool_tensors, set_past_experts_
from r1export.adapt.routing import Frozen
from r1export.adapt.trainer import (
    TrainingTask,
    batch_indices,
    learning_rate,
    reset_pools_,
    seed_of,
    train_pools_,
)
from r1export.errors import InputError, Unsupported
from r1export.update.container import read_tensors, write_tensors

PUBLISHED = replace(TRAIN, consolidate=1.0, batch_size=8, seed=1)
SETTINGS = replace(PUBLISHED, iterations=8, learning_rate=5e-3, checkpoint_every=3)
LARGE = replace(POOL, alpha=12.0)


class Killed(Exception):
    pass


def train(clip, task, settings=SETTINGS, *, number=1, distill=0.0, earlier=None, checkpoint=None, kill_at=None):
    pixels = Pixels(task.train, clip.preprocess)
    training = TrainingTask(number, task, pixels, replace(settings, distill_weight=distill))
    if distill:
        targets = distillation_targets(clip, pixels, training.visited(), reference_names())
        training = replace(training, targets=targets)
    pools = inject_experts_(clip.model, LARGE)
    reset_pools_(pools, settings.seed, number)
    if earlier:
        set_past_experts_(pools, earlier)

    def on_step(step):
        if step.number == kill_at:
            raise Killed

    try:
        losses = train_pools_(clip, pools, training, checkpoint=checkpoint, on_step=on_step)
    finally:
        eject_experts_(clip.model)
    return pools, losses


def same(one, other) -> bool:
    return all(np.array_equal(value, other[name]) for name, value in one.items()) and one.keys() == other.keys()


def test_training_tells_stripes_across_from_stripes_down(tiny_clip, stripes) -> None:
    """A random tiny CLIP is at chance; what it learns in 60 steps is the task, not luck: 16 of 16 by chance is 2^-16.

    Four images of each class in a batch of eight cannot be told apart, so the loss ends at log 4.
    """
    test = Pixels(stripes.test, tiny_clip.preprocess)
    pools, losses = train(tiny_clip, stripes, replace(PUBLISHED, iterations=60, learning_rate=1e-2))
    for pool in pools.values():
        pool.freeze_()
    tiny_clip.load_(pack_experts(pools).apply(tiny_clip.parameters()))
    assert accuracy(tiny_clip, stripes, test) == 1.0
    assert np.mean(losses[-5:]) - np.log(4) < 0.5 * (np.mean(losses[:5]) - np.log(4))


def test_only_the_pools_change(tiny_clip, stripes) -> None:
    before = tiny_clip.parameters()
    train(tiny_clip, stripes)
    assert same(before, tiny_clip.parameters())


TOWERS = {  # what behaves in training unlike in use, and the towers that can have pools then
    "BatchNorm": (
        lambda: nn.Sequential(nn.Conv2d(3, 24, 8, 8), nn.BatchNorm2d(24), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        ("textual",),
    ),
    "DropPath": (
        lambda: timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=8, depth=2, embed_dim=32, num_heads=2, num_classes=24,
            drop_path_rate=0.9,
        ),
        ("visual", "textual"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOWERS)
def test_the_frozen_base_is_trained_beside_as_it_is_deployed(tiny_clip, stripes, kind: str) -> None:
    torch.manual_seed(0)
    make, towers = TOWERS[kind]
    tiny_clip.model.visual = make()
    model = tiny_clip.model.eval().requires_grad_(False)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16), np.uint8))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    pools = inject_experts_(model, replace(LARGE, dropout=0.0, towers=towers))
    reset_pools_(pools, 1, 1)
    seen = []

    def look(step) -> None:
        with torch.no_grad():
            assert all(pool.training for pool in pools.values())
            seen.append(tiny_clip.encode_image(pixels))
            model.eval()
            seen.append(tiny_clip.encode_image(pixels))

    train_set = Pixels(stripes.train, tiny_clip.preprocess)
    train_pools_(tiny_clip, pools, TrainingTask(1, stripes, train_set, replace(SETTINGS, iterations=1)), on_step=look)
    eject_experts_(model)
    assert torch.equal(*seen)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert not any(pool.training for pool in pools.values())


def test_the_same_seed_gives_the_same_experts_bit_for_bit_and_another_seed_others(tiny_clip, stripes) -> None:
    one, other, different = (
        train(tiny_clip, stripes, replace(PUBLISHED, iterations=4, seed=seed))[0] for seed in (1, 1, 2)
    )
    assert same(pool_tensors(one), pool_tensors(other))
    assert not same(pool_tensors(one), pool_tensors(different))


def test_the_random_state_of_the_program_does_not_matter(tiny_clip, stripes) -> None:
    one, _ = train(tiny_clip, stripes)
    torch.manual_seed(99)
    np.random.seed(99)
    other, _ = train(tiny_clip, stripes)
    assert same(pool_tensors(one), pool_tensors(other))


@pytest.mark.parametrize(("kill_at", "distill"), [(2, 0.0), (3, 0.0), (5, 0.5), (6, 0.5), (8, 0.0)])
def test_a_run_killed_inside_a_task_and_resumed_is_the_uninterrupted_run(
    tiny_clip, stripes, tmp_path, kill_at: int, distill: float
) -> None:
    whole, losses = train(tiny_clip, stripes, distill=distill)
    checkpoint = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Killed):
        train(tiny_clip, stripes, distill=distill, checkpoint=checkpoint, kill_at=kill_at)
    assert checkpoint.exists() == (kill_at > 3)
    resumed, again = train(tiny_clip, stripes, distill=distill, checkpoint=checkpoint)
    assert same(pool_tensors(whole), pool_tensors(resumed))
    assert losses == again
    assert not checkpoint.exists()


@pytest.mark.parametrize("damage", ["losses", "optimizer.x.step", "visual"])
def test_a_damaged_checkpoint_is_named(tiny_clip, stripes, tmp_path, damage: str) -> None:
    checkpoint = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Killed):
        train(tiny_clip, stripes, checkpoint=checkpoint, kill_at=5)
    tensors = {name: value for name, value in read_tensors(checkpoint).items() if not name.startswith(damage)}
    extra = {damage: np.zeros(1, np.float32)} if "." in damage else {}
    write_tensors(checkpoint, tensors | extra)
    with pytest.raises(InputError, match=r"checkpoint\.safetensors: "):
        train(tiny_clip, stripes, checkpoint=checkpoint)


def test_orthogonality_keeps_a_task_off_what_earlier_tasks_merged(tiny_clip, stripes) -> None:
    earlier = pack_experts(train(tiny_clip, stripes)[0])
    overlaps = []
    for weight in (0.0, 1.0):
        settings = replace(PUBLISHED, iterations=20, learning_rate=5e-3, orthogonality_weight=weight)
        pools, _ = train(tiny_clip, stripes, settings, number=2, earlier=earlier)
        overlaps.append(sum(pool.overlap().item() for pool in pools.values()))
    assert overlaps[1] < 0.7 * overlaps[0]


def test_after_consolidation_only_the_experts_that_will_be_merged_are_trained(tiny_clip, stripes) -> None:
    pools, _ = train(tiny_clip, stripes, replace(PUBLISHED, iterations=8, learning_rate=5e-3, consolidate=0.5))
    merged = sum(int(pool.routing.gate.sum()) for pool in pools.values())
    assert len(pools) <= merged
    assert sum(len(pool.selected()) for pool in pools.values()) == merged
    for pool in pools.values():
        assert pool.routing.gate.nonzero()[:, 0].tolist() == pool.selected().tolist()
        # Images vote in the first 4 of 8 steps only: 8 images, or 2 prompts, times k_train votes each.
        assert int(pool.counts.sum()) in {4 * 8 * pool.settings.k_train, 4 * 2 * pool.settings.k_train}


@pytest.mark.parametrize("kill_at", [4, 6])
def test_a_consolidated_run_resumes_exactly(tiny_clip, stripes, tmp_path, kill_at: int) -> None:
    settings = replace(PUBLISHED, iterations=8, learning_rate=5e-3, consolidate=0.5, checkpoint_every=1)
    whole, _ = train(tiny_clip, stripes, settings)
    with pytest.raises(Killed):
        train(tiny_clip, stripes, settings, checkpoint=tmp_path / "c.safetensors", kill_at=kill_at)
    resumed, _ = train(tiny_clip, stripes, settings, checkpoint=tmp_path / "c.safetensors")
    assert same(pool_tensors(whole), pool_tensors(resumed))


@pytest.mark.parametrize(
    "change",
    [
        {"router": "straight-through"},
        {"gate": "sparse"},
        {"text_token": "end"},
        {"layers": (1,)},
    ],
    ids=str,
)
def test_what_is_merged_is_what_was_frozen_under_every_switch(tiny_clip, stripes, change: dict) -> None:
    """G1 in float64: under 1e-10 on normalised embeddings."""
    pools = inject_experts_(tiny_clip.model.double(), replace(LARGE, **change))
    reset_pools_(pools, 1, 1)
    pixels = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    tokens = tiny_clip.tokenize(["a photo of stripes", "nothing", "a"])
    train = Pixels(stripes.train, tiny_clip.preprocess)
    model = tiny_clip.model
    model.float()
    train_pools_(tiny_clip, pools, TrainingTask(1, stripes, train, SETTINGS))
    update = pack_experts(pools)
    model.double()
    for rows, pool in pools.items():  # what is packed is rounded to float32: the frozen model gets the same values
        factors = update.factors[rows]
        chosen = pool.selected()
        with torch.no_grad():
            pool.lora_B[:, chosen] = torch.from_numpy(factors.u.astype(np.float64)) / pool.settings.scaling
            pool.lora_A[chosen] = torch.from_numpy(factors.v.astype(np.float64))
        pool.route_(Frozen((pool.frozen().gate != 0).double()))
    frozen = [model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)]
    eject_experts_(model)
    weights = {name: value.numpy() for name, value in model.state_dict().items() if value.is_floating_point()}
    tiny_clip.load_(update.apply(weights))
    merged = [model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)]
    for one, other in zip(frozen, merged, strict=True):
        assert (one - other).abs().max() < 1e-10
    assert any(pair.u.any() for pair in update.factors.values())
    assert not any(hasattr(module, "end_of_text") for module in model.modules())


def test_a_sparse_gate_that_was_fixed_is_merged_as_it_was_trained(tiny_clip, stripes) -> None:
    pools = inject_experts_(tiny_clip.model, replace(LARGE, gate="sparse"))
    reset_pools_(pools, 1, 1)
    settings = replace(SETTINGS, consolidate=0.25)
    train_set = Pixels(stripes.train, tiny_clip.preprocess)
    train_pools_(tiny_clip, pools, TrainingTask(1, stripes, train_set, settings))
    assert all(torch.equal(pool.routing.gate, pool.frozen().gate) for pool in pools.values())
    eject_experts_(tiny_clip.model)


def test_a_layer_that_is_not_there_is_refused_by_its_number(tiny_clip) -> None:
    with pytest.raises(Unsupported, match=r"2 blocks, pool\.layers contains 7"):
        inject_experts_(tiny_clip.model, replace(LARGE, layers=(0, 7)))


def test_text_routers_see_nothing_at_the_start_and_the_text_at_its_end(tiny_clip) -> None:
    tokens = tiny_clip.tokenize(["a photo of stripes", "nothing", "a"])
    for where, distinct in (("start", 1), ("end", 3)):
        pools = inject_experts_(tiny_clip.model, replace(LARGE, towers=("textual",), text_token=where))
        reset_pools_(pools, 1, 1)
        seen = []
        pool = list(pools.values())[-1]
        pool.router.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        tiny_clip.encode_text(tokens)
        assert len(seen[0].round(decimals=5).unique(dim=0)) == distinct
        eject_experts_(tiny_clip.model)


def test_the_loss_over_all_classes_learns_as_well(tiny_clip, stripes) -> None:
    _, losses = train(tiny_clip, stripes, replace(SETTINGS, loss="all-classes", iterations=40, learning_rate=1e-2))
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_bf16_keeps_experts_in_float32_and_ends_near_the_same_loss(tiny_clip, stripes) -> None:
    (_, losses), (other, rounded) = (
        train(tiny_clip, stripes, replace(SETTINGS, precision=precision)) for precision in ("fp32", "bf16")
    )
    assert all(pool.lora_A.dtype == torch.float32 for pool in other.values())
    assert losses != rounded
    assert np.allclose(losses, rounded, atol=0.05)


def test_every_image_is_used_once_per_epoch_and_batches_span_epochs() -> None:
    drawn = np.concatenate([batch_indices(10, 4, step, seed=3, task=1) for step in range(5)])
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert not np.array_equal(drawn[:10], drawn[10:])


def test_a_batch_is_never_larger_than_the_task() -> None:
    assert sorted(batch_indices(3, 32, 0, seed=0, task=1)) == [0, 1, 2]


def test_the_learning_rate_falls_along_a_cosine() -> None:
    settings = replace(PUBLISHED, iterations=100, learning_rate=2e-3, min_learning_rate=1e-6)
    rates = [learning_rate(step, settings) for step in range(101)]
    assert rates[0] == 2e-3
    assert rates[100] == pytest.approx(1e-6)
    assert rates[50] == pytest.approx((2e-3 + 1e-6) / 2)
    assert rates == sorted(rates, reverse=True)


def test_seeds_of_different_paths_differ() -> None:
    assert len({seed_of(s, t, k) for s in range(5) for t in range(5) for k in range(5)}) == 125


def test_a_loss_that_is_not_finite_stops_the_task_by_name(tiny_clip, stripes) -> None:
    with pytest.raises(InputError, match=r"task stripes: the loss is .*learning_rate"):
        train(tiny_clip, stripes, replace(PUBLISHED, iterations=30, learning_rate=1e30))
