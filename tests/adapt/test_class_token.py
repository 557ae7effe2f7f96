"""The last block of an image tower computes its class token alone where nothing else is read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from adapt.test_inject_families import FAMILIES, gradients, train_at_random_
from settings import POOL

from r1export.adapt.class_token import class_token_only
from r1export.adapt.inject import inject_experts_


def rows_in_last_mlp(model: torch.nn.Module) -> list[int]:
    """How many tokens enter the last MLP within the context, and after it."""
    block, seen = model.visual.transformer.resblocks[-1], []
    handle = block.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    pixels = torch.rand(2, 3, 16, 16)
    with class_token_only(model):
        model.encode_image(pixels)
    model.encode_image(pixels)
    handle.remove()
    return seen


@pytest.mark.parametrize("family", ["plain", "layer scale", "open_clip's attention", "CoCa", "timm, class token"])
@pytest.mark.parametrize("targets", [("q", "k", "v", "out", "fc", "proj"), ("k", "fc")])
def test_embeddings_gradients_and_votes_are_those_of_all_tokens(family: str, targets: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval().requires_grad_(False)
    pools = inject_experts_(model, replace(POOL, dropout=0.0, alpha=12.0, targets=targets))
    train_at_random_(pools)
    for pool in pools.values():
        pool.counts.zero_()
        pool.train()
    whole = gradients(model, pools)
    votes = [pool.counts.clone() for pool in pools.values()]
    with class_token_only(model):
        first = gradients(model, pools)
    for one, other in zip(whole, first, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    assert all(torch.equal(pool.counts, 2 * before) for pool, before in zip(pools.values(), votes, strict=True))


@pytest.mark.parametrize("experts", [False, True])
def test_the_last_mlp_sees_one_token_within_and_all_of_them_afterwards(experts: bool) -> None:
    model = FAMILIES["plain"]().eval()
    if experts:
        inject_experts_(model, POOL)
    assert rows_in_last_mlp(model) == [1, 5]


def test_a_tower_that_averages_its_tokens_is_left_as_it_is() -> None:
    model = FAMILIES["plain"]().eval()
    model.visual.pool_type = "avg"
    assert rows_in_last_mlp(model) == [5, 5]
