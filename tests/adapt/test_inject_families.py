"""Experts in the linears and convolutions of every family of towers that open_clip knows, found by structure."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import open_clip
import pytest
import timm
import torch
from settings import POOL
from timm.layers import Conv2dSame, to_2tuple
from timm.models.fastvit import FastVit
from torch import nn

from r1export.adapt.convolution_pool import ConvolutionPool
from r1export.adapt.inject import eject_experts_, inject_experts_
from r1export.adapt.pack import pack_experts
from r1export.adapt.pool import ExpertPool, routed
from r1export.adapt.routing import Batch, PerSample
from r1export.errors import Unsupported
from r1export.update.factors import Rows

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
    return with_convolutions(name, img_size=32, **options)


def with_convolutions(trunk: str | nn.Module, **options: object) -> nn.Module:
    model = open_clip.CustomTextCLIP(24, VIT, TEXT)
    model.visual = Tower(timm.create_model(trunk, num_classes=24, **options) if isinstance(trunk, str) else trunk)
    return model


def resnet() -> nn.Module:
    """With its last BatchNorm of every block switched on, which open_clip starts at zero."""
    model = open_clip.CLIP(24, RESNET, TEXT)
    for name, parameter in model.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.ones_(parameter)
    return model


def fastvit() -> nn.Module:
    mixers = ("repmixer", "repmixer", "repmixer", "attention")
    return FastVit(layers=(1, 1, 1, 1), token_mixers=mixers, embed_dims=(16, 16, 32, 32), mlp_ratios=(2,) * 4,
        num_classes=24, layer_scale_init_value=0.5)  # fmt: skip


RESNET = VIT | {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (16, 16, 24, 32), "ls_init_value": 0.5}

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
    "Swin": lambda: with_trunk(
        "swin_tiny_patch4_window7_224", window_size=4, depths=(2, 1), num_heads=(2, 4), embed_dim=16
    ),
    "ResNet": resnet,
    "EfficientNet": lambda: with_convolutions("tf_efficientnet_lite0"),
    "MobileNetV4": lambda: with_convolutions("mobilenetv4_conv_small_035"),
    "FastViT": lambda: with_convolutions(fastvit()),
    "ConvNeXt": lambda: with_convolutions("convnext_atto", **CONVNEXT),
    "ConvNeXt, linears": lambda: with_convolutions("convnext_atto", conv_mlp=False, **CONVNEXT),
    "ViTamin": lambda: with_trunk("vitamin_small_224"),
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
        *to_2tuple(model.visual.image_size),
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


def gradients(model: nn.Module, pools: dict[object, ExpertPool]) -> list[torch.Tensor]:
    learned = [pool.lora_A for pool in pools.values()] + [pool.lora_B for pool in pools.values()]
    loss = sum((embeds * torch.linspace(-1, 1, 24)).sum() for embeds in encode(model))
    return [loss.detach(), *torch.autograd.grad(loss, learned)]


@pytest.mark.parametrize("changes", [{}, {"targets": ("v", "fc")}])
def test_pools_that_are_computed_together_in_training_give_what_each_gives_alone(model, changes) -> None:
    pools = inject_experts_(model, replace(POOL, dropout=0.0, alpha=12.0, **changes))
    train_at_random_(pools)
    alone = gradients(model, pools)
    for pool in pools.values():
        pool.train()
    for one, other in zip(alone, gradients(model, pools), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


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
        (lambda: timm.create_model("resnet10t", num_classes=24), "has no layers that match pool.targets"),
        (lambda: timm.create_model("test_nfnet", num_classes=24), "has no blocks"),
    ],
)
def test_a_tower_that_cannot_be_adapted_is_refused_with_the_reason_and_left_as_it_was(visual, reason) -> None:
    model = open_clip.CustomTextCLIP(24, VIT, TEXT)
    model.visual = Tower(visual())
    names = list(model.state_dict())
    with pytest.raises(Unsupported, match=reason):
        inject_experts_(model, replace(POOL, towers=("textual", "visual")))
    assert list(model.state_dict()) == names
    assert inject_experts_(model, replace(POOL, towers=("textual",)))


def adapted(model: nn.Module, **settings: object) -> list[str]:
    pools = inject_experts_(model, replace(POOL, towers=("visual",), **settings))
    return [rows.parameter.removeprefix("visual.").removeprefix("trunk.").removesuffix(".weight") for rows in pools]


def test_of_an_inverted_bottleneck_the_pointwise_convolutions_are_adapted_and_no_others() -> None:
    assert adapted(FAMILIES["EfficientNet"](), layers=(0, 5)) == [
        "blocks.0.0.conv_pw", "blocks.3.0.conv_pw", "blocks.3.0.conv_pwl",
    ]  # fmt: skip
    assert adapted(FAMILIES["EfficientNet"](), layers=(0, 5), targets=("fc",)) == ["blocks.3.0.conv_pw"]


def test_squeeze_and_excitation_is_left_alone() -> None:
    assert not [name for name in adapted(with_convolutions("efficientnet_b0")) if ".se." in name]


def test_blocks_are_counted_over_all_stages() -> None:
    assert len(adapted(FAMILIES["EfficientNet"](), layers=tuple(range(5, 16)))) == 2 * 11
    last = tuple(range(-11, 0))  # which a tower with fewer blocks takes too
    assert adapted(FAMILIES["EfficientNet"](), layers=last) == adapted(
        FAMILIES["EfficientNet"](), layers=tuple(range(5, 16))
    )
    with pytest.raises(Unsupported, match=r"has 16 blocks, pool\.layers contains 16"):
        adapted(FAMILIES["EfficientNet"](), layers=(16,))


def test_larger_kernels_are_adapted_by_target() -> None:
    block = "layer1.0"
    found = adapted(FAMILIES["ResNet"](), targets=("out", "fc", "proj", "conv"))
    assert found[:4] == ["attnpool.c_proj", f"{block}.conv1", f"{block}.conv2", f"{block}.conv3"]
    assert adapted(FAMILIES["ResNet"](), targets=("q", "k")) == ["attnpool.k_proj", "attnpool.q_proj"]


@pytest.mark.parametrize("convolution", [
    nn.Conv2d(6, 4, 3, stride=2, padding=2, dilation=2), Conv2dSame(6, 4, 3, stride=2), nn.Conv2d(6, 4, 1, stride=2),
], ids=["dilated", "padded to its input", "pointwise"])  # fmt: skip
def test_a_convolution_with_experts_is_the_convolution_by_the_merged_weight(convolution) -> None:
    pool = ConvolutionPool(convolution, replace(POOL, rank=3, k_train=3, k_merge=3))
    pool.reset_(torch.Generator().manual_seed(0))
    pool.lora_B.data.normal_(generator=torch.Generator().manual_seed(1))
    pool.freeze_()
    x = torch.rand(2, 6, 7, 7, generator=torch.Generator().manual_seed(2))
    unmerged = convolution(x) + pool(x)
    rows = Rows("weight", 0, 4)
    merged = pack_experts({rows: pool}).apply({"weight": convolution.weight.detach().numpy()})
    convolution.weight.data.copy_(torch.from_numpy(merged["weight"]))
    torch.testing.assert_close(convolution(x), unmerged, atol=1e-5, rtol=1e-5)


def test_an_image_whose_windows_are_rows_of_the_batch_votes_once_with_its_own_mean() -> None:
    model = FAMILIES["Swin"]().eval()
    pools = inject_experts_(model, replace(POOL, towers=("visual",), rank=4, k_train=2, k_merge=2))
    train_at_random_(pools)
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad(), routed(pools.values(), lambda pool: PerSample()):
        together = model.encode_image(pixels)
        for i in range(3):
            torch.testing.assert_close(model.encode_image(pixels[i : i + 1])[0], together[i], atol=1e-4, rtol=1e-4)


def test_scaled_cosine_attention_is_refused() -> None:
    with pytest.raises(Unsupported, match="scaled cosine"):
        inject_experts_(open_clip.CLIP(24, VIT | {"scaled_cosine_attn": True}, TEXT), POOL)


def test_factors_of_one_family_are_float32(model) -> None:
    pools = inject_experts_(model, POOL)
    assert {pair.u.dtype for pair in pack_experts(pools).factors.values()} == {np.dtype(np.float32)}
