"""What comes out of pools is what the unmerged model computes, and it goes back in as it was."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from adapt.random_experts import encode, train_at_random_
from settings import POOL

from r1export.adapt.inject import eject_experts_, inject_experts_
from r1export.adapt.pack import (
    load_pool_tensors_,
    load_rounded_factors_,
    pack_experts,
    pool_tensors,
    set_past_experts_,
    set_past_pools_,
)
from r1export.errors import InputError


def test_the_merged_model_is_the_frozen_model_to_rounding_in_float64(tiny_clip) -> None:
    """Factors are packed in float32, so the experts are put on float32 values first; the rest is exact to 1e-10."""
    tiny_clip.model.double()
    before = encode(tiny_clip, torch.float64)
    pools = inject_experts_(tiny_clip.model, replace(POOL, rank=4, k_train=4, k_merge=3, alpha=4.0))
    train_at_random_(pools)
    for pool in pools.values():
        pool.lora_A.data, pool.lora_B.data = pool.lora_A.data.float().double(), pool.lora_B.data.float().double()
        pool.freeze_()
    frozen = encode(tiny_clip, torch.float64)
    update = pack_experts(pools)
    eject_experts_(tiny_clip.model)
    tiny_clip.load_(update.apply(tiny_clip.parameters()))
    for one, other, base in zip(frozen, encode(tiny_clip, torch.float64), before, strict=True):
        assert (one - other).abs().max() < 1e-10
        assert (one - base).abs().max() > 1e-2


def test_the_one_merge_gives_the_frozen_model(tiny_clip) -> None:
    before = encode(tiny_clip)
    pools = inject_experts_(tiny_clip.model, replace(POOL, alpha=12.0))
    train_at_random_(pools)
    for pool in pools.values():
        pool.freeze_()
    frozen = encode(tiny_clip)
    update = pack_experts(pools)
    eject_experts_(tiny_clip.model)
    tiny_clip.load_(update.apply(tiny_clip.parameters()))
    for one, other, base in zip(frozen, encode(tiny_clip), before, strict=True):
        assert (one - other).abs().max() < 1e-5
        assert (one - base).abs().max() > 1e-2


@pytest.mark.parametrize("gate", ["binary", "sparse"])
def test_experts_packed_in_float16_are_those_of_the_unmerged_model(tiny_clip, gate: str) -> None:
    pools = inject_experts_(tiny_clip.model, replace(POOL, alpha=12.0, gate=gate))
    train_at_random_(pools)
    for pool in pools.values():
        pool.counts[:] = torch.arange(12)
        if gate == "sparse":
            pool.importance.data.copy_(torch.linspace(-0.5, 0.6, 12))
    update = pack_experts(pools, np.float16)
    load_rounded_factors_(pools, update)
    for pool in pools.values():
        pool.freeze_()
    frozen = encode(tiny_clip)
    again = pack_experts(pools, np.float16)
    assert 2 * update.nbytes == pack_experts(pools).nbytes
    assert all(np.array_equal(pair.u, again.factors[rows].u) for rows, pair in update.factors.items())
    eject_experts_(tiny_clip.model)
    tiny_clip.load_(update.apply(tiny_clip.parameters()))
    for one, other in zip(frozen, encode(tiny_clip), strict=True):
        assert (one - other).abs().max() < 1e-5


def test_the_update_holds_the_selected_experts_in_order(tiny_clip) -> None:
    pools = inject_experts_(tiny_clip.model, replace(POOL, towers=("visual",), targets=("out",)))
    train_at_random_(pools)
    rows, pool = next(iter(pools.items()))
    pool.counts.zero_()
    pool.counts[[7, 2, 11, 5]] = torch.tensor([5, 5, 9, 1])
    pair = pack_experts(pools).factors[rows]
    assert np.array_equal(pair.v, pool.lora_A[[2, 5, 7, 11]].detach().numpy())
    np.testing.assert_allclose(pair.u, pool.lora_B[:, [2, 5, 7, 11]].detach().numpy() / 12, rtol=1e-6)


def test_pools_survive_being_written_as_tensors(tiny_clip) -> None:
    pools = inject_experts_(tiny_clip.model, POOL)
    train_at_random_(pools)
    tensors, before = pool_tensors(pools), encode(tiny_clip)
    assert "visual.transformer.resblocks.1.mlp.c_fc.weight[0:128].lora_A" in tensors
    tensors = {name: value.copy() for name, value in tensors.items()}
    train_at_random_(pools, scale=2.0)
    load_pool_tensors_(pools, tensors, "here")
    assert all(torch.equal(one, other) for one, other in zip(before, encode(tiny_clip), strict=True))


def test_pools_know_the_merged_columns_of_earlier_tasks(tiny_clip) -> None:
    pools = inject_experts_(tiny_clip.model, POOL)
    train_at_random_(pools)
    set_past_experts_(pools, pack_experts(pools))
    for pool in pools.values():
        torch.testing.assert_close(pool.past, pool.lora_B[:, pool.selected()].detach(), rtol=1e-6, atol=0)


def test_pools_know_all_columns_of_earlier_pools_as_the_released_code_does(tiny_clip) -> None:
    pools = inject_experts_(tiny_clip.model, POOL)
    tasks = []
    for _ in range(2):
        train_at_random_(pools)
        tasks.append({name: value.copy() for name, value in pool_tensors(pools).items()})
    set_past_pools_(pools, {"first": tasks[0], "second": tasks[1]})
    rows, pool = next(iter(pools.items()))
    assert np.array_equal(pool.past, np.concatenate([task[f"{rows}.lora_B"] for task in tasks], axis=1))
    merged = pool.overlap()
    set_past_experts_(pools, pack_experts(pools))
    assert merged > pool.overlap()  # 24 columns instead of 4
    del tasks[1][f"{rows}.lora_B"]
    with pytest.raises(InputError, match=r"^second: .*lora_B is missing"):
        set_past_pools_(pools, {"first": tasks[0], "second": tasks[1]})


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_tensors_that_do_not_fit_the_pools_are_named_with_their_file(tiny_clip, change: str) -> None:
    pools = inject_experts_(tiny_clip.model, POOL)
    tensors = pool_tensors(pools)
    name = "visual.transformer.resblocks.1.mlp.c_fc.weight[0:128].lora_A"
    if change == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][1:]
    with pytest.raises(InputError) as caught:
        load_pool_tensors_(pools, tensors, "run/pool.safetensors")
    assert str(caught.value).startswith(f"run/pool.safetensors: {name} is ")
