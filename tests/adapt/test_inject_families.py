"""Experts beside the linears of every family of ViT that open_clip knows, found by structure."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import open_clip
import pytest
import timm
import torch
from settings import POOL
from torch import nn

from r1export.adapt.inject import eject_experts_, inject_experts_
from r1export.adapt.pack import pack_experts
from r1export.adapt.pool import Batch, ExpertPool
from r1export.errors import Unsupported

TEXT = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}


class Tower(nn.Module):
    """A timm trunk as open_clip wraps it."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk, self.image_size = trunk, (32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.trunk(x)


def with_trunk(name: str, **options: object) -> nn.Module:
    model = open_clip.CustomTextCLIP(24, VIT, TEXT)
    model.visual = Tower(timm.create_model(name, img_size=32, num_classes=24, **options))
    return model


FAMILIES = {
    "plain": lambda: open_clip.CLIP(24, VIT, TEXT),
    "custom text": lambda: open_clip.CustomTextCLIP(24, VIT, TEXT),
    "open_clip's attention": lambda: open_clip.CLIP(
        24, VIT | {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_fc": True}, TEXT
    ),
    "layer scale": lambda: open_clip.CLIP(24, VIT | {"ls_init_value": 0.5}, TEXT),
    "CoCa": lambda: open_clip.CoCa(
        24,
        {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
        TEXT | {"embed_cls": True, "output_tokens": True},
        VIT | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    ),
    "timm, class token": lambda: with_trunk("vit_tiny_patch16_224", depth=1, embed_dim=32, num_heads=2),
    "timm, no class token": lambda: with_trunk(
        "vit_tiny_patch16_224", depth=1, embed_dim=32, num_heads=2, class_token=False, global_pool="avg"
    ),
    "EVA, fused": lambda: with_trunk(
        "eva02_tiny_patch14_224", depth=1, embed_dim=32, num_heads=2, patch_size=8, qkv_fused=True, qkv_bias=True
    ),
    "EVA, gated MLP": lambda: with_trunk(
        "eva02_tiny_patch14_224", depth=1, embed_dim=32, num_heads=2, patch_size=8, qkv_fused=False
    ),
}


@pytest.fixture(params=FAMILIES, ids=lambda name: name.replace(" ", "-"))
def model(request) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[request.param]().eval().requires_grad_(False)


def encode(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(
        3,
        3,
        *(model.visual.image_size if isinstance(model.visual.image_size, tuple) else (16, 16)),
        generator=generator,
    )
    tokens = torch.randint(1, 50, (3, 8), generator=generator)
    return model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)


def train_at_random_(pools: dict[object, ExpertPool]) -> None:
    generator = torch.Generator().manual_seed(3)
    for pool in pools.values():
        pool.reset_(generator)
        pool.lora_B.data.copy_(torch.randn(pool.lora_B.shape, generator=generator) * 0.3)
        pool.counts.copy_(torch.randint(0, 50, pool.counts.shape, generator=generator))


def test_the_one_merge_gives_the_frozen_model(model) -> None:
    with torch.no_grad():
        before = encode(model)
        pools = inject_experts_(model, replace(POOL, alpha=12.0))
        train_at_random_(pools)
        for pool in pools.values():
            pool.freeze_()
        frozen, update = encode(model), pack_experts(pools)
        eject_experts_(model)
        parameters = dict(model.named_parameters())
        for name, value in update.apply({n: p.numpy() for n, p in parameters.items()}).items():
            parameters[name].copy_(torch.from_numpy(value))
        for one, other, base in zip(frozen, encode(model), before, strict=True):
            assert (one - other).abs().max() < 2e-5
            assert (one - base).abs().max() > 1e-3


def test_every_expert_learns_and_every_pool_counts_votes(model) -> None:
    pools = inject_experts_(model, replace(POOL, rank=4, k_train=4, k_merge=2, dropout=0.0))
    for pool in pools.values():
        pool.reset_(torch.Generator().manual_seed(0))
    model.train()
    sum((embeds * torch.linspace(-1, 1, 24)).sum() for embeds in encode(model)).backward()
    for rows, pool in pools.items():
        assert pool.lora_B.grad is not None, rows
        assert pool.lora_B.grad.abs().max() > 0, rows
        assert pool.counts.sum() == 3 * 4, rows


def test_ejecting_restores_the_very_model(model) -> None:
    with torch.no_grad():
        before, names, kinds = encode(model), list(model.state_dict()), [type(m) for m in model.modules()]
        train_at_random_(inject_experts_(model, POOL))
        eject_experts_(model)
        assert list(model.state_dict()) == names
        assert [type(m) for m in model.modules()] == kinds
        assert all(torch.equal(one, other) for one, other in zip(before, encode(model), strict=True))


def test_a_tower_without_a_class_token_routes_on_the_mean() -> None:
    pools = inject_experts_(FAMILIES["timm, no class token"](), POOL)
    assert {r.parameter.split(".")[0]: p.route_on for r, p in pools.items()} == {
        "visual": "mean",
        "text": "first",
    }
    pool = ExpertPool(torch.empty(2, 2), replace(POOL, rank=2, k_train=1, k_merge=1), route_on="mean")
    with torch.no_grad():
        pool.router.weight.copy_(torch.eye(2))
        pool.router.bias.zero_()
        x = torch.tensor([[[5.0, 0.0], [0.0, 9.0], [0.0, 9.0]]])
        assert pool.gate(pool.token(x), Batch()).tolist() == [0, 1]


def test_the_rows_of_a_packed_qkv_are_three_linears() -> None:
    pools = inject_experts_(FAMILIES["timm, class token"](), replace(POOL, towers=("visual",), targets=("q", "v")))
    assert [str(rows) for rows in pools] == [f"visual.trunk.blocks.0.attn.qkv.weight[{a}:{a + 32}]" for a in (0, 64)]


def test_the_decoder_of_coca_is_left_alone() -> None:
    pools = inject_experts_(FAMILIES["CoCa"](), POOL)
    assert {rows.parameter.split(".")[0] for rows in pools} == {"visual", "text"}


@pytest.mark.parametrize(
    ("visual", "reason"),
    [
        (lambda: timm.create_model("resnet10t", num_classes=24), "has no transformer blocks"),
        (
            lambda: timm.create_model(
                "swin_tiny_patch4_window7_224", img_size=56, num_classes=24, depths=(1,), num_heads=(3,)
            ),
            "attends within windows",
        ),
    ],
)
def test_a_tower_that_is_no_vit_is_refused_with_the_reason_and_left_as_it_was(visual, reason) -> None:
    model = open_clip.CustomTextCLIP(24, VIT, TEXT)
    model.visual = Tower(visual())
    names = list(model.state_dict())
    with pytest.raises(Unsupported, match=reason):
        inject_experts_(model, replace(POOL, towers=("textual", "visual")))
    assert list(model.state_dict()) == names
    assert inject_experts_(model, replace(POOL, towers=("textual",)))


def test_scaled_cosine_attention_is_refused() -> None:
    with pytest.raises(Unsupported, match="scaled cosine"):
        inject_experts_(open_clip.CLIP(24, VIT | {"scaled_cosine_attn": True}, TEXT), POOL)


def test_factors_of_one_family_are_float32(model) -> None:
    pools = inject_experts_(model, POOL)
    assert {pair.u.dtype for pair in pack_experts(pools).factors.values()} == {np.dtype(np.float32)}
