"""Experts beside the linears of a real open_clip model, and out again."""

from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from settings import POOL

from r1export.adapt.inject import eject_experts_, inject_experts_
from r1export.adapt.pack import (
    load_pool_tensors_,
    load_rounded_factors_,
    pack_experts,
    pool_tensors,
    set_past_experts_,
)
from r1export.errors import Unsupported
from r1export.update.factors import Rows


def encode(clip, dtype=torch.float32):
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    tokens = clip.tokenize(["a red dot", "two words more", ""])
    with torch.no_grad():
        return clip.model.encode_image(pixels, normalize=True), clip.model.encode_text(tokens, normalize=True)


def train_at_random_(pools, scale: float = 0.5) -> None:
    generator = torch.Generator().manual_seed(3)
    for pool in pools.values():
        pool.reset_(generator)
        with torch.no_grad():
            pool.lora_B.copy_(torch.randn(pool.lora_B.shape, generator=generator) * scale)
            pool.counts.copy_(torch.randint(0, 50, pool.counts.shape, generator=generator))


def test_fresh_experts_change_nothing(tiny_clip) -> None:
    before = encode(tiny_clip)
    inject_experts_(tiny_clip.model, POOL)
    for one, other in zip(before, encode(tiny_clip), strict=True):
        torch.testing.assert_close(one, other, atol=2e-7, rtol=0)


def test_ejecting_restores_the_very_model(tiny_clip) -> None:
    before, names = encode(tiny_clip), list(tiny_clip.model.state_dict())
    train_at_random_(inject_experts_(tiny_clip.model, POOL))
    assert not torch.equal(before[0], encode(tiny_clip)[0])
    eject_experts_(tiny_clip.model)
    assert list(tiny_clip.model.state_dict()) == names
    assert all(torch.equal(one, other) for one, other in zip(before, encode(tiny_clip), strict=True))


def test_every_block_of_both_towers_has_six_adapted_linears(tiny_clip) -> None:
    pools = inject_experts_(tiny_clip.model, POOL)
    assert len(pools) == 2 * 2 * 6
    block = "visual.transformer.resblocks.0"
    rows = [str(r) for r in pools if r.parameter.startswith(block)]
    assert rows == [
        f"{block}.attn.in_proj_weight[0:32]", f"{block}.attn.in_proj_weight[32:64]", f"{block}.attn.in_proj_weight[64:96]",
        f"{block}.attn.out_proj.weight[0:32]", f"{block}.mlp.c_fc.weight[0:128]", f"{block}.mlp.c_proj.weight[0:32]",
    ]  # fmt: skip


def test_towers_and_targets_can_be_chosen(tiny_clip) -> None:
    pools = inject_experts_(tiny_clip.model, replace(POOL, towers=("visual",), targets=("v", "fc")))
    assert {r.parameter.split(".")[0] for r in pools} == {"visual"}
    assert {(r.start, r.stop) for r in pools if "in_proj" in r.parameter} == {(64, 96)}
    assert len(pools) == 4


def test_vit_b16_has_144_pools_and_4978368_trainable_parameters() -> None:
    """The count that the paper's "96.7 % fewer" stands for; meta tensors hold no values."""
    with torch.device("meta"):
        model = open_clip.CLIP(**dict(open_clip.get_model_config("ViT-B-16").items()))
        pools = inject_experts_(model, POOL)
    assert len(pools) == 144
    assert sum(p.numel() for pool in pools.values() for p in pool.parameters()) == 4_978_368
    assert sum(p.numel() for pool in pools.values() for p in (pool.lora_A, pool.lora_B)) == 3_317_760


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
    load_pool_tensors_(pools, tensors)
    assert all(torch.equal(one, other) for one, other in zip(before, encode(tiny_clip), strict=True))


def test_pools_know_the_merged_columns_of_earlier_tasks(tiny_clip) -> None:
    pools = inject_experts_(tiny_clip.model, POOL)
    train_at_random_(pools)
    set_past_experts_(pools, pack_experts(pools))
    for pool in pools.values():
        torch.testing.assert_close(pool.past, pool.lora_B[:, pool.selected()].detach(), rtol=1e-6, atol=0)


def test_a_convolutional_tower_is_refused_by_name() -> None:
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 8, "heads": 1, "layers": 1},
    }
    model = open_clip.CLIP(**config)
    with pytest.raises(Unsupported, match=r"visual tower \(ModifiedResNet\)"):
        inject_experts_(model, POOL)


def test_rows_are_the_keys_of_the_pools(tiny_clip) -> None:
    assert all(isinstance(rows, Rows) for rows in inject_experts_(tiny_clip.model, POOL))
