"""The layers of a CLIP whose linears and convolutions have experts: Y = X W^T + bias + pool(X)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r1export.adapt.blocks import AnyModule
from r1export.adapt.pool import ExpertPool


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
        y: Tensor = self.base(x) + self.pool(x)
        return y


class RankOnePacked(nn.Module):
    """A frozen linear (3d, in) that gives q, k and v together, with a pool for each third that is targeted."""

    def __init__(self, base: nn.Linear, pools: dict[str, ExpertPool]) -> None:
        super().__init__()
        self.base, self.pools = base, nn.ModuleDict(pools)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(_with_pools(self.base(x), self.pools, x), -1)


def _with_pools(packed: Tensor, pools: nn.ModuleDict, x: Tensor) -> list[Tensor]:
    """q, k and v (n, tokens, d) out of `packed` (n, tokens, 3d), each plus what its pool, if it has one, makes of `x`."""
    parts = zip("qkv", packed.chunk(3, -1), strict=True)
    return [part + pools[name](x) if name in pools else part for name, part in parts]


class RankOneAttention(nn.Module):
    """A frozen nn.MultiheadAttention (batch first), or open_clip's own, with pools for q, k, v and out; self-attention only."""

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
        """(n, tokens, d) -> (n, tokens, d); `key` and `value` are `query`. A mask is (L, L) or (n*heads, L, L), additive."""
        base, (n, tokens, width) = self.base, query.shape
        packed = F.linear(query, base.in_proj_weight, base.in_proj_bias)
        q, k, v = (
            part.view(n, tokens, base.num_heads, -1).transpose(1, 2) for part in _with_pools(packed, self.pools, query)
        )
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
        out = base.out_proj(mixed)
        out = out + self.pools["out"](mixed) if "out" in self.pools else out
        return out if of_open_clip else (out, None)


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
