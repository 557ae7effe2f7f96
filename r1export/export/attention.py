"""Self-attention of every family in one form that exports well: constant shapes, one transpose for q, k and v together.

    scores = (q * scale) k^T [+ mask]        out = softmax(scores) v        per head, scale = 1 / sqrt(d / heads)

It works on flattened tokens (n*tokens, d), so that every linear is one Gemm that includes its bias and has its weight as
torch stores it. docs/experiments/export.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AnyModule = Any  # an nn.Module of open_clip or timm whose parts are found by name: families have no type in common
Blocks = nn.Sequential | nn.ModuleList
PARTS = {"qkv", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}
OPEN_CLIP_PARTS = {"ln_q", "ln_k", "attn_drop", "ln_inner", "out_proj", "out_drop"}


class OpenAttention(nn.Module):
    """The attention `base` over (n*tokens, d) or (n, tokens, d), whichever comes; its parameters are base's own.

    Takes the arguments of all families: nn.MultiheadAttention's (query, key, value), open_clip's and timm's (x).
    """

    def __init__(self, base: AnyModule, tokens: int) -> None:
        super().__init__()
        self.base, self.tokens, self.heads = base, tokens, base.num_heads
        self.head_dim = self._part("out_proj", "proj").in_features // self.heads

    def _part(self, *names: str) -> AnyModule:
        """The first of base's children so named: families differ in names, and a second registration would rename parameters."""
        return next((part for name in names if (part := getattr(self.base, name, None)) is not None), nn.Identity())

    def forward(
        self, x: Tensor, key: Tensor | None = None, value: Tensor | None = None, *, rope: Tensor | None = None,
        attn_mask: Tensor | None = None, need_weights: bool = False, is_causal: bool = False,
    ) -> Tensor | tuple[Tensor, None]:  # fmt: skip
        """(n*tokens, d) -> (n*tokens, d); `key` and `value` are `x`; a mask is (L, L) or (n, L, L), additive."""
        q, k, v = self.heads_of(x)
        if rope is not None:
            q, k = self._rotate(q, rope), self._rotate(k, rope)
        scores = torch.matmul(q * self.head_dim**-0.5, k.transpose(-1, -2))
        if attn_mask is not None:
            scores = scores + (attn_mask.unsqueeze(1) if attn_mask.ndim == 3 else attn_mask)
        mixed = torch.matmul(scores.softmax(-1), v)
        if getattr(self.base, "head_scale", None) is not None:
            mixed = mixed * self.base.head_scale
        stream = (-1, self.tokens) if x.ndim == 3 else (-1,)
        mixed = mixed.permute(0, 2, 1, 3).reshape(*stream, self.heads * self.head_dim)
        out = self.project(mixed, x)
        return (out, None) if isinstance(self.base, nn.MultiheadAttention) else out

    def project(self, mixed: Tensor, x: Tensor) -> Tensor:
        """What follows the heads: (..., heads*head_dim) -> (..., d)."""
        mixed = self._part("norm", "ln_inner")(mixed)
        if getattr(self.base, "gate", None) is not None:
            mixed = mixed * self.base.gate(x).sigmoid()
        out: Tensor = self._part("out_proj", "proj")(mixed)
        return out

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each (n, heads, tokens, head_dim), q and k normalised where the family does so."""
        q, k, v = self._split(x)
        return self._part("q_norm", "ln_q")(q), self._part("k_norm", "ln_k")(k), v

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        base, shape = self.base, (-1, self.tokens)
        if getattr(base, "q_proj", None) is not None:
            return tuple(
                p(x).reshape(*shape, self.heads, self.head_dim).transpose(1, 2)
                for p in (base.q_proj, base.k_proj, base.v_proj)
            )
        packed = base.qkv(x) if hasattr(base, "qkv") else F.linear(x, base.in_proj_weight, base.in_proj_bias)
        q, k, v = packed.reshape(*shape, 3 * self.heads, self.head_dim).transpose(1, 2).split(self.heads, 1)
        if getattr(base, "q_bias", None) is not None:
            q, v = (
                part + bias.reshape(self.heads, 1, self.head_dim) for part, bias in ((q, base.q_bias), (v, base.v_bias))
            )
        return q, k, v

    def _rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        from timm.layers import apply_rot_embed_cat

        prefix = self.base.num_prefix_tokens
        turned = apply_rot_embed_cat(x[:, :, prefix:], rope, half=getattr(self.base, "rotate_half", False))
        return torch.cat([x[:, :, :prefix], turned], 2) if prefix else turned


class FirstTokenBlock(nn.Module):
    """The last block of a tower that only looks at its first token afterwards: the others give keys and values, no more.

    (n, tokens, d) or (n*tokens, d) -> (n, 1, d). For a depth of twelve this takes a sixteenth of the tower's work away.
    """

    def __init__(self, block: AnyModule, tokens: int) -> None:
        super().__init__()
        self.block, self.tokens = block, tokens

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        block, attn = self.block, self.block.attn
        named = ("ln_1", "ls_1", "ln_2", "ls_2") if hasattr(block, "ln_1") else ("norm1", "ls1", "norm2", "ls2")
        norm1, scale1, norm2, scale2 = (getattr(block, name) for name in named)
        normed = norm1(x)
        q, k, v = attn.heads_of(normed)
        scores = torch.matmul(q[:, :, :1] * attn.head_dim**-0.5, k.transpose(-1, -2))
        mixed = torch.matmul(scores.softmax(-1), v).reshape(-1, attn.heads * attn.head_dim)
        first, first_normed = (stream.reshape(-1, self.tokens, x.shape[-1])[:, 0] for stream in (x, normed))
        first = first + scale1(attn.project(mixed, first_normed))
        out: Tensor = first + scale2(block.mlp(norm2(first)))
        return out.unsqueeze(1)


def is_known(attention: nn.Module) -> bool:
    """Whether `attention` has the parts of an attention that OpenAttention can stand for, and no others."""
    if isinstance(attention, nn.MultiheadAttention):
        return attention.batch_first and attention.in_proj_weight is not None and attention.bias_k is None
    children, own = (
        {name for name, _ in attention.named_children()},
        {name for name, _ in attention.named_parameters(recurse=False)},
    )
    if "out_proj" in children and "in_proj_weight" in own:
        return children <= OPEN_CLIP_PARTS and own <= {"in_proj_weight", "in_proj_bias", "head_scale"}
    projected = "qkv" in children or {"q_proj", "k_proj", "v_proj"} <= children
    grouped = getattr(attention, "num_kv_groups", 1) != 1
    return (
        projected
        and "proj" in children
        and children <= PARTS
        and own <= {"q_bias", "v_bias"}
        and hasattr(attention, "num_heads")
        and not grouped
    )


def block_lists(tower: nn.Module) -> Iterator[Blocks]:
    """The sequences of blocks of a tower: every child has a known attention and an MLP."""
    for module in tower.modules():
        if (
            isinstance(module, Blocks)
            and len(module)
            and all(hasattr(b, "mlp") and is_known(getattr(b, "attn", b)) for b in module)
        ):
            yield module


def open_up_(blocks: Blocks, tokens: int, *, first_only: bool) -> None:
    """Rewrite a sequence of blocks in place: the activations between them become (n*tokens, d)."""
    for block in blocks:
        block.attn = OpenAttention(block.attn, tokens)
    first, last = blocks[0], blocks[-1]
    if first_only:
        last = blocks[-1] = FirstTokenBlock(last, tokens)
        first = last if len(blocks) == 1 else first
    first.register_forward_pre_hook(_flatten)
    if not first_only:
        last.register_forward_hook(_unflatten(tokens))


def share_masks_(tower: AnyModule) -> None:
    """One mask per sample for all heads (CoCa's text tower): a copy for each head would bake the batch into the graph."""
    for module in tower.modules():
        if hasattr(module, "_build_additive_mask"):
            module.heads = 1


def _flatten(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].reshape(-1, args[0].shape[-1]), *args[1:])


def _unflatten(tokens: int) -> Callable[[nn.Module, object, Tensor], Tensor]:
    return lambda module, args, out: out.reshape(-1, tokens, out.shape[-1])
