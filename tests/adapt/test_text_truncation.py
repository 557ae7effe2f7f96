"""Texts are encoded as far as they go, and nothing but the time changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import open_clip
import pytest
import torch
from settings import POOL
from torch import nn

from r1export.adapt.inject import inject_experts_
from r1export.adapt.text_truncation import short_texts, text_ends

VIT = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 12, "vocab_size": 60, "width": 16, "heads": 2, "layers": 2}
END = 55
CAUSAL = {
    "plain": lambda: open_clip.CLIP(24, VIT, TEXT),
    "custom text": lambda: open_clip.CustomTextCLIP(24, VIT, TEXT),
    "ends at a named token": lambda: open_clip.CustomTextCLIP(24, VIT, TEXT | {"pool_type": "eos", "eos_id": END}),
}
OTHERS = {
    "looks ahead": lambda: open_clip.CLIP(24, VIT, TEXT | {"no_causal_mask": True}),
    "read at the last position": lambda: open_clip.CustomTextCLIP(24, VIT, TEXT | {"pool_type": "last"}),
    "a class token behind the text": lambda: open_clip.CustomTextCLIP(24, VIT, TEXT | {"embed_cls": True}),
}


def made(recipe) -> nn.Module:
    torch.manual_seed(0)
    return recipe().eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    """Three texts that end at 3, 6 and 4; the second has a token above the end token where it may stand."""
    tokens = torch.randint(1, END, (3, 12), generator=torch.Generator().manual_seed(1))
    for text, end in zip(tokens, (3, 6, 4), strict=True):
        text[end], text[end + 1 :] = END, 0
    return tokens


@contextmanager
def seen(model: nn.Module) -> Iterator[set[int]]:
    """How many tokens the blocks of the text tower see."""
    found: set[int] = set()
    block = getattr(model, "text", model).transformer.resblocks[0]
    handle = block.register_forward_pre_hook(lambda _, inputs: found.add(inputs[0].shape[1]))
    yield found
    handle.remove()


@pytest.mark.parametrize("family", CAUSAL)
def test_embeddings_and_gradients_are_those_of_the_whole_tower(family, tokens):
    model = made(CAUSAL[family])
    weights = [p for n, p in model.named_parameters() if "visual" not in n and p.ndim]

    def embeds_and_gradients() -> list[torch.Tensor]:
        embeds = model.encode_text(tokens, normalize=True)
        return [embeds, *torch.autograd.grad(embeds[:, :3].sum(), weights)]

    whole = embeds_and_gradients()
    with short_texts(model), seen(model) as lengths:
        short = embeds_and_gradients()
    assert lengths == {7}
    for ours, theirs in zip(short, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", OTHERS)
def test_a_tower_that_reads_beyond_the_end_is_left_alone(family, tokens):
    model = made(OTHERS[family])
    with short_texts(model), seen(model) as lengths:
        short = model.encode_text(tokens)
    assert min(lengths) >= 12
    assert torch.equal(short, model.encode_text(tokens))


def test_afterwards_the_tower_is_whole_again_even_if_something_failed(tokens):
    model = made(CAUSAL["plain"])
    with pytest.raises(KeyError), short_texts(model):
        raise KeyError
    with seen(model) as lengths:
        model.encode_text(tokens)
    assert lengths == {12}


def test_the_named_end_is_found_below_a_higher_token(tokens):
    tower = made(CAUSAL["ends at a named token"]).text
    tokens[1, 2] = END + 2
    assert text_ends(tower, tokens).tolist() == [3, 6, 4]
    assert text_ends(made(CAUSAL["plain"]), tokens).tolist() == [3, 2, 4]


@pytest.mark.parametrize("token", ["start", "end"])
def test_experts_vote_for_short_texts_as_for_whole_ones(token, tokens):
    model = made(CAUSAL["plain"])
    pools = inject_experts_(model, replace(POOL, dropout=0.0, towers=("textual",), text_token=token))
    for i, pool in enumerate(pools.values()):
        pool.reset_(torch.Generator().manual_seed(i))
        nn.init.normal_(pool.lora_B, std=0.1)
    model.train()
    counts = []
    for context in (short_texts(model), seen(model)):
        for pool in pools.values():
            pool.counts.zero_()
        with context:
            model.encode_text(tokens)
        counts.append(torch.stack([pool.counts for pool in pools.values()]))
    assert counts[0].sum() > 0
    assert torch.equal(*counts)
