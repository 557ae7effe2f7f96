"""Experts beside the linears of a real open_clip model, and out again."""

from dataclasses import replace

import open_clip
import torch
from adapt.random_experts import encode, train_at_random_
from settings import POOL

from r1export.adapt.inject import eject_experts_, inject_experts_
from r1export.update.factors import Rows


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


def test_rows_are_the_keys_of_the_pools(tiny_clip) -> None:
    assert all(isinstance(rows, Rows) for rows in inject_experts_(tiny_clip.model, POOL))
