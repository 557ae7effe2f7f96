"""Add pools of rank-1 experts to the linears and convolutions of a CLIP, and remove them again.

    Y = X W^T + bias + pool(X)        for q, k, v, out of every attention, fc, proj and, if asked, larger kernels of every block

A packed `in_proj_weight` or `qkv.weight` (3d, d) is three adapted linears: its rows 0:d, d:2d, 2d:3d.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from r1export.adapt.blocks import (
    AnyModule,
    Block,
    Layer,
    attentions,
    block_layers,
    chosen_blocks,
    is_attention_pool,
    routing_token,
    tower_of,
)
from r1export.adapt.convolution_pool import ConvolutionPool
from r1export.adapt.hf_text import hf_layers
from r1export.adapt.lora_layers import RankOneAttention, RankOneAttentionPool, RankOneLayer, RankOnePacked
from r1export.adapt.pool import ExpertPool, Pools, TowerInputs
from r1export.adapt.pool_settings import PoolSettings, RoutingToken, Tower
from r1export.adapt.text_truncation import text_ends
from r1export.errors import Unsupported
from r1export.update.factors import Rows

WRAPPERS = (RankOneLayer, RankOnePacked, RankOneAttention, RankOneAttentionPool)


def inject_experts_(model: nn.Module, settings: PoolSettings) -> Pools:
    """Wrap the layers of `model` that `settings` targets, in place; the new pools add nothing until they are trained.

    Returns the pools by the rows of the parameter that they adapt, sorted.

    Raises:
        Unsupported: a tower has no blocks, its attention is none that is known, or nothing in it is targeted; the model
            is as it was.
    """
    pools: Pools = {}
    try:
        for tower in settings.towers:
            token, before = routing_token(model, tower, settings), len(pools)
            injector = _Injector(model, settings, token, _watch_inputs_(model, tower, token), pools)
            for block in chosen_blocks(model, tower, settings):
                injector.inject_(block)
            if len(pools) == before:
                raise Unsupported(
                    f"the {tower} tower has no layers that match pool.targets: {', '.join(settings.targets)}",
                    "add fc and proj (pointwise layers) or conv (larger kernels), or remove the tower from pool.towers",
                )
    except Unsupported:
        eject_experts_(model)
        raise
    for pool in pools.values():
        pool.train(model.training)
    return dict(sorted(pools.items()))


def _watch_inputs_(model: AnyModule, tower: Tower, token: RoutingToken) -> TowerInputs:
    """Note where each text ends whenever tokens enter the text tower, or how many images enter the other."""
    inputs, module = TowerInputs(), tower_of(model, tower)[1]
    if token == "end":
        watched = module.token_embedding

        def note(_: nn.Module, entering: tuple[Tensor, ...]) -> None:
            inputs.ends = text_ends(module, entering[0])
    elif tower == "visual" and token == "mean":
        watched = module

        def note(_: nn.Module, entering: tuple[Tensor, ...]) -> None:
            inputs.images = len(entering[0])
    else:
        return inputs
    watched.noting_inputs = watched.register_forward_pre_hook(note)
    return inputs


@dataclass(frozen=True)
class _Injector:
    """Wraps the layers of the blocks of one tower and collects their pools."""

    model: nn.Module
    settings: PoolSettings
    route_on: RoutingToken
    inputs: TowerInputs
    pools: Pools

    def inject_(self, block: Block) -> None:
        """Pools for the targeted layers of a block."""
        if is_attention_pool(block.module):
            self._attention_pool_(block)
            return
        of_transformers = hf_layers(block.module)
        layers = of_transformers or block_layers(block.module)
        attending = [] if of_transformers else list(attentions(block.module))
        for parent, child, path in attending:
            self._attention_(parent, child, f"{block.name}.{path}")
        for parent, child, path, layer, target in layers:
            if target in self.settings.targets:
                setattr(parent, child, self._layer(layer, f"{block.name}.{path}.weight"))

    def _attention_pool_(self, block: Block) -> None:
        """All of it is wrapped, since it computes its projections in its forward. At position 0 stands the mean."""
        pool = block.module
        pools: dict[str, ExpertPool] = {
            target: self._pool(pool.get_submodule(child).weight, f"{block.name}.{child}.weight", route_on="first")
            for target, child in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "c_proj"))
            if target in self.settings.targets
        }
        if pools:
            self.model.set_submodule(block.name, RankOneAttentionPool(pool, pools))

    def _attention_(self, parent: nn.Module, child: str, name: str) -> None:
        attention: AnyModule = getattr(parent, child)
        if getattr(attention, "in_proj_weight", None) is not None:
            _refuse_unknown(attention, name)
            setattr(parent, child, self._packed_attention(attention, name))
            return
        if isinstance(getattr(attention, "qkv", None), nn.Linear):
            self._qkv_(attention, name)
        self._projections_(attention, name)

    def _packed_attention(self, attention: AnyModule, name: str) -> nn.Module:
        """nn.MultiheadAttention or open_clip's own: its projections are computed in its forward, so all of it is wrapped."""
        pools = self._thirds(attention.in_proj_weight, f"{name}.in_proj_weight")
        if "out" in self.settings.targets:
            pools["out"] = self._pool(attention.out_proj.weight, f"{name}.out_proj.weight")
        return RankOneAttention(attention, pools) if pools else attention

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
                setattr(attention, child, self._layer(linear, f"{name}.{child}.weight"))

    def _thirds(self, weight: Tensor, name: str) -> dict[str, ExpertPool]:
        """A pool for each targeted third of the rows of a packed projection (3d, in)."""
        height, targets = len(weight) // 3, self.settings.targets
        return {
            target: self._pool(weight[i * height : (i + 1) * height], name, i * height)
            for i, target in enumerate("qkv")
            if target in targets
        }

    def _layer(self, layer: Layer, name: str) -> RankOneLayer:
        if isinstance(layer, nn.Linear):
            return RankOneLayer(layer, self._pool(layer.weight, name))
        pool = ConvolutionPool(layer, self.settings)
        self.pools[Rows(name, 0, len(layer.weight))] = pool
        return RankOneLayer(layer, pool)

    def _pool(self, weight: Tensor, name: str, start: int = 0, *, route_on: RoutingToken | None = None) -> ExpertPool:
        """The pool of `weight`, which are the rows of parameter `name` from `start` on."""
        pool = ExpertPool(weight, self.settings, route_on=route_on or self.route_on, inputs=self.inputs)
        self.pools[Rows(name, start, start + len(weight))] = pool
        return pool


def _refuse_unknown(attention: AnyModule, name: str) -> None:
    if not getattr(attention, "batch_first", True):
        raise Unsupported(f"{name} is not batch-first self-attention", "update open_clip_torch")
    if getattr(attention, "logit_scale", None) is not None:
        raise Unsupported(f"{name} is scaled cosine attention", "remove the tower from pool.towers")


def eject_experts_(model: AnyModule) -> None:
    """Inverse of `inject_experts_`: the model is the plain open_clip model again, its weights untouched."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, WRAPPERS):
                setattr(module, name, child.base)
            if hasattr(child, "separate"):
                module.qkv_bias_separate = child.separate
        if hasattr(module, "noting_inputs"):
            module.noting_inputs.remove()
            del module.noting_inputs
