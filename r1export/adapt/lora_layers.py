"""The layers of a CLIP whose linears and convolutions have experts: Y = X W^T + bias + pool(X)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r1export.adapt.blocks import AnyModule
from r1export.adapt.pool import ExpertPool, add_experts_
from r1export.adapt.routing import PerSample


class RankOneLayer(nn.Module):
    """A frozen linear or convolution with a pool of rank-1 experts."""

    def __init__(self, base: nn.Linear | nn.Conv2d, pool: ExpertPool) -> None:
        super().__init__()
        self.base, self.pool = base, pool

    @property
    def weight(self) -> Tensor:
        """The frozen weight (out, in, ...): open_clip asks the MLP for its dtype."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.base, nn.Linear):
            return _adapted(self.base, x, [self.pool])
        y: Tensor = self.base(x) + self.pool(x)
        return y


class RankOnePacked(nn.Module):
    """A frozen linear (3d, in) that gives q, k and v together, with a pool for each third that is targeted."""

    def __init__(self, base: nn.Linear, pools: dict[str, ExpertPool]) -> None:
        super().__init__()
        self.base, self.pools = base, nn.ModuleDict(pools)

    def forward(self, x: Tensor) -> Tensor:
        return _adapted(self.base, x, _chosen(self.pools, "qkv", self.base.out_features // 3))


def _chosen(pools: nn.ModuleDict, targets: Sequence[str], width: int) -> list[ExpertPool | int]:
    """The pool of each target, or the number of its rows where it has none."""
    return [cast(ExpertPool, pools[name]) if name in pools else width for name in targets]


def _adapted(base: Callable[[Tensor], Tensor], x: Tensor, pools: Sequence[ExpertPool | int]) -> Tensor:
    """base(x) (n, tokens, out) plus what the pools of its rows add, in the order of `add_experts_`.

    In training the pools of a linear are computed together and in place. Else each is called, so that hooks see its input and output.
    """
    present = [pool for pool in pools if isinstance(pool, ExpertPool)]
    if present and all(pool.training and not isinstance(pool.routing, PerSample) for pool in present):
        return add_experts_(base(x.flatten(0, -2)), x, pools).view(*x.shape[:-1], -1)
    y = base(x)
    parts = [
        part + pool(x) if isinstance(pool, ExpertPool) else part
        for part, pool in zip(y.chunk(len(pools), -1), pools, strict=True)
    ]
    return torch.cat(parts, -1)


class RankOneAttention(nn.Module):
    """A frozen nn.MultiheadAttention (batch first), or open_clip's own, with pools for q, k, v and out: self-attention, of all tokens or of the first."""

    def __init__(self, base: AnyModule, pools: dict[str, ExpertPool]) -> None:
        super().__init__()
        self.base, self.pools = base, nn.ModuleDict(pools)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, None]:
        """(n, tokens, d) -> (n, tokens, d). `key` is `query`, or all tokens where `query` is the first; `value` is `key`.

        A mask is (L, L) or (n*heads, L, L), additive.
        """
        base, (n, tokens, width) = self.base, query.shape
        q, k, v = (part.unflatten(-1, (base.num_heads, -1)).transpose(1, 2) for part in self._projected(query, key))
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.view(n, base.num_heads, tokens, tokens)
        of_open_clip = not isinstance(base, nn.MultiheadAttention)
        if of_open_clip:
            q, k = base.ln_q(q), base.ln_k(k)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        if of_open_clip and base.head_scale is not None:
            mixed = mixed * base.head_scale
        mixed = mixed.transpose(1, 2).reshape(n, tokens, width)
        mixed = base.ln_inner(mixed) if of_open_clip else mixed
        out = _adapted(base.out_proj, mixed, _chosen(self.pools, ["out"], width))
        return out if of_open_clip else (out, None)

    def _projected(self, query: Tensor, key: Tensor | None) -> Sequence[Tensor]:
        """q, k and v (n, tokens, d)."""
        if key is None or key is query:
            return self._part("qkv", query).chunk(3, -1)
        return self._part("q", query), *self._part("kv", key).chunk(2, -1)

    def _part(self, targets: str, x: Tensor) -> Tensor:
        """The projections that `targets`, a part of "qkv", names, one after the other in the last axis."""
        weight, bias, width = self.base.in_proj_weight, self.base.in_proj_bias, x.shape[-1]
        start = "qkv".index(targets) * width
        rows = slice(start, start + len(targets) * width)
        base = partial(F.linear, weight=weight[rows], bias=None if bias is None else bias[rows])
        return _adapted(base, x, _chosen(self.pools, targets, width))


class RankOneAttentionPool(nn.Module):
    """The frozen attention pool of open_clip's ResNets with pools for q, k, v and out.

    The query is the mean of a feature map, which stands at position 0 before its positions.
    """

    def __init__(self, base: AnyModule, pools: dict[str, ExpertPool]) -> None:
        super().__init__()
        self.base, self.pools = base, nn.ModuleDict(pools)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) -> (n, out)."""
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + self.base.positional_embedding
        query = self._project("q", tokens[:, :1])
        q, k, v = (
            part.unflatten(-1, (self.base.num_heads, -1)).transpose(1, 2)
            for part in (query, self._project("k", tokens), self._project("v", tokens))
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self._project("out", mixed)[:, 0]

    def _project(self, target: str, x: Tensor) -> Tensor:
        y: Tensor = self.base.get_submodule("c_proj" if target == "out" else f"{target}_proj")(x)
        return y + self.pools[target](x) if target in self.pools else y
