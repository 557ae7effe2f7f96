"""Compute only the class token in the last block of an image tower: the embedding reads nothing else.

The other tokens still give keys and values. Their queries, outputs and MLP have no effect on the embedding, so embeddings,
votes and gradients are the same but for rounding. In a tower of twelve blocks a fourteenth of the products is saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor

from r1export.adapt.clip import ClipModel


@contextmanager
def class_token_only(model: ClipModel) -> Iterator[None]:
    """Within it, the last block of the image tower returns its class token alone, (n, 1, d).

    A tower that is not open_clip's own, or whose embedding reads other tokens, is left as it is.
    """
    if not _reads_class_token(model.visual):
        yield
        return
    block = model.visual.transformer.resblocks[-1]
    block.forward = partial(_class_token, block)
    try:
        yield
    finally:
        del block.forward


def _reads_class_token(tower: Any) -> bool:
    return (
        isinstance(tower, VisionTransformer)
        and tower.pool_type == "tok"
        and tower.attn_pool is None
        and not tower.output_tokens
        and tower.transformer.batch_first
        and not tower.transformer.grad_checkpointing
        and type(tower.transformer.resblocks[-1]) is ResidualAttentionBlock
    )


def _class_token(block: Any, x: Tensor, attn_mask: None = None) -> Tensor:
    """What the block gives at position 0: (n, tokens, d) -> (n, 1, d)."""
    normed = block.ln_1(x)
    mixed, _ = block.attn(normed[:, :1], normed, normed, need_weights=False)
    first = x[:, :1] + block.ls_1(mixed)
    y: Tensor = first + block.ls_2(block.mlp(block.ln_2(first)))
    return y
