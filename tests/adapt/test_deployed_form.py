"""An image tower in its deployed form gives the same embeddings, and has one weight where there were branches and norms."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from adapt.test_inject_families import fastvit, resnet
from torch import nn

from r1export.adapt.deployed_form import Fold, deploy_, foldable
from r1export.errors import Unsupported

SIZE = (32, 32)
TOWERS = {
    "EfficientNet": lambda: timm.create_model("tf_efficientnet_lite0", num_classes=24),
    "MobileNetV4": lambda: timm.create_model("mobilenetv4_conv_small_035", num_classes=24),
    "ResNet": lambda: resnet().visual,
    "FastViT": fastvit,
    "MobileOne": lambda: timm.create_model("mobileone_s0", num_classes=24),
}


def with_statistics(tower: nn.Module) -> nn.Module:
    """As if trained: every BatchNorm has seen something."""
    torch.manual_seed(0)
    for module in tower.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return tower.eval().requires_grad_(False)


def norms(tower: nn.Module) -> list[str]:
    return [name for name, module in tower.named_modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("name", TOWERS)
def test_the_deployed_form_gives_the_same_embeddings_and_keeps_no_norm_behind_a_convolution(name: str) -> None:
    tower = with_statistics(TOWERS[name]())
    images = torch.rand(3, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    before = nn.functional.normalize(tower(images), dim=-1)
    assert deploy_(tower, SIZE)
    assert (nn.functional.normalize(tower(images), dim=-1) - before).abs().max() < 2e-6
    assert all(name.endswith("blocks.0.norm") for name in norms(tower))  # before the attention of FastViT
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.float32}


def test_the_same_weights_give_the_same_deployed_form() -> None:
    first, second = with_statistics(fastvit()), with_statistics(fastvit())
    second.load_state_dict(first.state_dict())
    deploy_(first, SIZE)
    deploy_(second, SIZE)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_folding_is_computed_in_float64_and_rounded_once() -> None:
    tower = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4, eps=1e-3)))
    convolution, norm = copy.deepcopy(tower).double()
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    deploy_(tower, SIZE)
    assert torch.equal(tower[0].weight, (gain[:, None, None, None] * convolution.weight).float())
    assert torch.equal(tower[0].bias, (norm.bias - gain * norm.running_mean).float())


def test_a_tower_without_branches_and_norms_is_not_touched(tiny_clip) -> None:
    before = copy.deepcopy(tiny_clip.model.visual.state_dict())
    assert tiny_clip.deployed_form == 0
    assert not deploy_(tiny_clip.model.visual, (16, 16))
    after = tiny_clip.model.visual.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


class Shared(nn.Module):
    """The output of its convolution is read twice, and its second convolution is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.read_twice, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.used_twice, self.other_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.last, self.last_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.read_twice(x)
        x = self.norm(x) + x
        x = self.used_twice(x) + self.other_norm(self.used_twice(x))
        return self.last_norm(self.last(x))


def test_a_norm_is_only_folded_into_what_nothing_else_reads() -> None:
    assert foldable(Shared().eval(), SIZE) == [Fold("last", "last_norm")]


def test_a_tower_that_does_not_run_is_refused() -> None:
    with pytest.raises(Unsupported, match="does not run"):
        deploy_(nn.Sequential(nn.Conv2d(7, 4, 1), nn.BatchNorm2d(4)).eval(), SIZE)
