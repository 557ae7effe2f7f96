"""Put pools of rank-1 experts beside the linears of a CLIP, and take them out again.

    Y = X W^T + bias + pool(X)        for q, k, v, out of every attention and fc, proj of every MLP

The packed `in_proj_weight` (3d, d) of nn.MultiheadAttention is three adapted linears: its rows 0:d, d:2d, 2d:3d.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r1export.adapt.pool import ExpertPool, PoolSettings
from r1export.errors import Unsupported
from r1export.update.factors import ExpertUpdate, Factors, Rows

TARGETS = ("q", "k", "v", "out", "fc", "proj")


class RankOneLinear(nn.Module):
    """A frozen linear with a pool of rank-1 experts beside it."""

    def __init__(self, base: nn.Linear, pool: ExpertPool) -> None:
        super().__init__()
        self.base, self.pool = base, pool

    @property
    def weight(self) -> nn.Parameter:
        """The frozen weight (out, in): open_clip asks the MLP for its dtype."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.pool(x)


class RankOneAttention(nn.Module):
    """A frozen batch-first nn.MultiheadAttention with pools beside q, k, v and out; self-attention only."""

    def __init__(self, base: nn.MultiheadAttention, pools: dict[str, ExpertPool]) -> None:
        super().__init__()
        self.base, self.pools = base, nn.ModuleDict(pools)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, need_weights: bool = False, attn_mask: Tensor | None = None) -> tuple[Tensor, None]:
        """(n, tokens, d) -> (n, tokens, d); `key` and `value` are `query`."""
        base, (n, tokens, width) = self.base, query.shape
        parts = F.linear(query, base.in_proj_weight, base.in_proj_bias).chunk(3, -1)
        q, k, v = (
            (part + self.pools[name](query) if name in self.pools else part).view(n, tokens, base.num_heads, -1).transpose(1, 2)
            for name, part in zip("qkv", parts, strict=True)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask).transpose(1, 2).reshape(n, tokens, width)
        out = base.out_proj(mixed)
        return (out + self.pools["out"](mixed) if "out" in self.pools else out), None


def _blocks(model: nn.Module, towers: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    """The residual blocks of the chosen towers with their names. Raises Unsupported where a tower has none."""
    found: dict[str, int] = dict.fromkeys(towers, 0)
    for name, module in model.named_modules():
        tower = "visual" if name.startswith("visual.") else "text"
        if tower in found and isinstance(getattr(module, "attn", None), nn.MultiheadAttention | RankOneAttention) and hasattr(module, "mlp"):
            found[tower] += 1
            yield name, module
    for tower, count in found.items():
        if not count:
            kind = type(model.visual if tower == "visual" else getattr(model, "text", getattr(model, "transformer", model))).__name__
            raise Unsupported(f"the {tower} tower ({kind}) has no transformer blocks with nn.MultiheadAttention", "use a ViT, or leave the tower out of pool.towers")


def inject_experts_(
    model: nn.Module, settings: PoolSettings, *, towers: tuple[str, ...] = ("visual", "text"), targets: tuple[str, ...] = TARGETS
) -> dict[Rows, ExpertPool]:
    """Wrap the targeted linears of `model` in place; the new pools add nothing until they are trained.

    Returns the pools by the rows of the parameter beside which they stand, sorted.

    Raises:
        Unsupported: a tower has no transformer blocks, or its attention is not batch-first self-attention.
    """
    pools: dict[Rows, ExpertPool] = {}
    for name, block in list(_blocks(model, towers)):
        _inject_attention_(block, f"{name}.attn", settings, targets, pools)
        for target, layer in (("fc", "c_fc"), ("proj", "c_proj")):
            if target in targets:
                linear = getattr(block.mlp, layer)
                pool = pools[Rows(f"{name}.mlp.{layer}.weight", 0, linear.out_features)] = _pool(linear.weight, settings)
                setattr(block.mlp, layer, RankOneLinear(linear, pool))
    for pool in pools.values():
        pool.train(model.training)
    return dict(sorted(pools.items()))


def _inject_attention_(block: nn.Module, name: str, settings: PoolSettings, targets: tuple[str, ...], pools: dict[Rows, ExpertPool]) -> None:
    attention, beside = block.attn, {}
    if not attention.batch_first or attention.in_proj_weight is None:
        raise Unsupported(f"{name} is not batch-first self-attention", "update open_clip_torch")
    width = attention.embed_dim
    for i, target in enumerate("qkv"):
        if target in targets:
            beside[target] = pools[Rows(f"{name}.in_proj_weight", i * width, (i + 1) * width)] = _pool(attention.out_proj.weight, settings)
    if "out" in targets:
        beside["out"] = pools[Rows(f"{name}.out_proj.weight", 0, width)] = _pool(attention.out_proj.weight, settings)
    if beside:
        block.attn = RankOneAttention(attention, beside)


def _pool(weight: Tensor, settings: PoolSettings) -> ExpertPool:
    return ExpertPool(weight.shape[1], weight.shape[0], settings, device=weight.device, dtype=weight.dtype)


def eject_experts_(model: nn.Module) -> None:
    """Inverse of `inject_experts_`: the model is the plain open_clip model again, its weights untouched."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, RankOneLinear | RankOneAttention):
                setattr(module, name, child.base)


def pack_experts(pools: dict[Rows, ExpertPool]) -> ExpertUpdate:
    """The selected experts of every pool, scaling folded in, as they are merged and shipped."""
    factors = {}
    for rows, pool in pools.items():
        chosen = pool.selected()
        lora_A, lora_B = (tensor.detach().float().cpu().numpy() for tensor in (pool.lora_A[chosen], pool.lora_B[:, chosen]))
        factors[rows] = Factors.pack(lora_A, lora_B, pool.settings.scaling)
    return ExpertUpdate(factors)


def remember_(pools: dict[Rows, ExpertPool], earlier: ExpertUpdate) -> None:
    """Give every pool the merged columns of B of all earlier tasks, for the orthogonality loss."""
    for rows, pool in pools.items():
        columns = earlier.factors[rows].u.astype(np.float32) / np.float32(pool.settings.scaling)
        pool.past = torch.from_numpy(columns).to(pool.lora_B)


def pool_tensors(pools: dict[Rows, ExpertPool]) -> dict[str, np.ndarray]:
    """A, B, router and counts of all pools, named `ROWS.lora_A` and so on: the unmerged model."""
    return {f"{rows}.{name}": tensor.detach().cpu().numpy() for rows, pool in pools.items() for name, tensor in pool.state_dict().items()}


def load_pool_tensors_(pools: dict[Rows, ExpertPool], tensors: dict[str, np.ndarray]) -> None:
    """Inverse of `pool_tensors`."""
    for rows, pool in pools.items():
        pool.load_state_dict({name: torch.from_numpy(np.array(tensors[f"{rows}.{name}"])) for name in pool.state_dict()})
