"""Add pools of rank-1 experts to the linears of a CLIP, and remove them again.

    Y = X W^T + bias + pool(X)        for q, k, v, out of every attention and fc, proj of every MLP

A packed `in_proj_weight` or `qkv.weight` (3d, d) is three adapted linears: its rows 0:d, d:2d, 2d:3d.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from r1export.adapt.blocks import AnyModule, Block, chosen_blocks, mlp_linears, routing_token, tower_of
from r1export.adapt.lora_layers import RankOneAttention, RankOneLinear, RankOnePacked
from r1export.adapt.pool import EndOfText, ExpertPool, Pools, PoolSettings, RoutingToken
from r1export.adapt.text_truncation import text_ends
from r1export.errors import Unsupported
from r1export.update.factors import Rows


def inject_experts_(model: nn.Module, settings: PoolSettings) -> Pools:
    """Wrap the linears of `model` that `settings` targets, in place; the new pools add nothing until they are trained.

    Returns the pools by the rows of the parameter that they adapt, sorted.

    Raises:
        Unsupported: a tower has no transformer blocks, or its attention is none that is known; the model is as it was.
    """
    pools: Pools = {}
    try:
        for tower in settings.towers:
            token = routing_token(model, tower, settings)
            ends = _watch_ends_(model) if token == "end" else None
            injector = _Injector(settings, token, ends, pools)
            for block in chosen_blocks(model, tower, settings):
                injector.inject_(block)
    except Unsupported:
        eject_experts_(model)
        raise
    for pool in pools.values():
        pool.train(model.training)
    return dict(sorted(pools.items()))


def _watch_ends_(model: AnyModule) -> EndOfText:
    """Note where each text ends whenever tokens enter the text tower."""
    ends, tower = EndOfText(), tower_of(model, "textual")[1]

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        ends.positions = text_ends(tower, inputs[0])

    embedding = tower.token_embedding
    embedding.end_of_text = embedding.register_forward_pre_hook(note)
    return ends


@dataclass(frozen=True)
class _Injector:
    """Wraps the linears of the blocks of one tower and collects their pools."""

    settings: PoolSettings
    route_on: RoutingToken
    ends: EndOfText | None
    pools: Pools

    def inject_(self, block: Block) -> None:
        """Pools for the targeted linears of a block."""
        self._attention_(block.module, f"{block.name}.attn")
        self._mlp_(block.module.mlp, f"{block.name}.mlp")

    def _mlp_(self, mlp: nn.Module, name: str) -> None:
        *forth, back = mlp_linears(mlp)
        for target, linears in (("fc", forth), ("proj", [back])):
            if target in self.settings.targets:
                for parent, child, path, linear in linears:
                    setattr(parent, child, self._linear(linear, f"{name}.{path}.weight"))

    def _attention_(self, block: AnyModule, name: str) -> None:
        attention = block.attn
        if getattr(attention, "in_proj_weight", None) is not None:
            self._packed_attention_(block, name)
        elif isinstance(getattr(attention, "qkv", None), nn.Linear):
            self._qkv_(attention, name)
            self._projections_(attention, name)
        elif all(isinstance(getattr(attention, f"{target}_proj", None), nn.Linear) for target in "qkv"):
            self._projections_(attention, name)
        else:
            raise Unsupported(
                f"{name} ({type(attention).__name__}) has no q, k and v that experts could adapt",
                "leave the tower out of pool.towers",
            )

    def _packed_attention_(self, block: AnyModule, name: str) -> None:
        """nn.MultiheadAttention or open_clip's own: its projections are computed in its forward, so all of it is wrapped."""
        attention = block.attn
        _refuse_unknown(attention, name)
        pools = self._thirds(attention.in_proj_weight, f"{name}.in_proj_weight")
        if "out" in self.settings.targets:
            pools["out"] = self._pool(attention.out_proj.weight, f"{name}.out_proj.weight")
        if pools:
            block.attn = RankOneAttention(attention, pools)

    def _qkv_(self, attention: AnyModule, name: str) -> None:
        """timm's attention: one linear gives q, k and v."""
        pools = self._thirds(attention.qkv.weight, f"{name}.qkv.weight")
        if not pools:
            return
        attention.qkv = RankOnePacked(attention.qkv, pools)
        # Without this timm's EvaAttention takes the weight out of qkv, and the pools would have no effect.
        if hasattr(attention, "qkv_bias_separate"):
            attention.qkv.separate, attention.qkv_bias_separate = attention.qkv_bias_separate, True

    def _projections_(self, attention: AnyModule, name: str) -> None:
        """The linears of an attention that has one for each purpose."""
        for target, child in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "proj")):
            linear = getattr(attention, child, None)
            if target in self.settings.targets and isinstance(linear, nn.Linear):
                setattr(attention, child, self._linear(linear, f"{name}.{child}.weight"))

    def _thirds(self, weight: Tensor, name: str) -> dict[str, ExpertPool]:
        """A pool for each targeted third of the rows of a packed projection (3d, in)."""
        height, targets = len(weight) // 3, self.settings.targets
        return {
            target: self._pool(weight[i * height : (i + 1) * height], name, i * height)
            for i, target in enumerate("qkv")
            if target in targets
        }

    def _linear(self, linear: nn.Linear, name: str) -> RankOneLinear:
        return RankOneLinear(linear, self._pool(linear.weight, name))

    def _pool(self, weight: Tensor, name: str, start: int = 0) -> ExpertPool:
        """The pool of `weight`, which are the rows of parameter `name` from `start` on."""
        pool = ExpertPool(weight, self.settings, route_on=self.route_on, ends=self.ends)
        self.pools[Rows(name, start, start + len(weight))] = pool
        return pool


def _refuse_unknown(attention: AnyModule, name: str) -> None:
    if not getattr(attention, "batch_first", True):
        raise Unsupported(f"{name} is not batch-first self-attention", "update open_clip_torch")
    if getattr(attention, "logit_scale", None) is not None:
        raise Unsupported(f"{name} is scaled cosine attention", "leave the tower out of pool.towers")


def eject_experts_(model: AnyModule) -> None:
    """Inverse of `inject_experts_`: the model is the plain open_clip model again, its weights untouched."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, RankOneLinear | RankOnePacked | RankOneAttention):
                setattr(module, name, child.base)
            if hasattr(child, "separate"):
                module.qkv_bias_separate = child.separate
            if hasattr(child, "end_of_text"):
                child.end_of_text.remove()
                del child.end_of_text
