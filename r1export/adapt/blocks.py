"""The parts of a CLIP that can have experts: towers, their blocks, the layers of a block, and the routing token.

Model families are recognized by their modules, not by names or versions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeGuard

from timm.layers import Conv2dSame, EffectiveSEModule, SEModule
from torch import nn

from r1export.adapt.hf_text import hf_blocks, hf_routing_token, is_hf_tower
from r1export.adapt.pool_settings import PoolSettings, RoutingToken, Target, Tower
from r1export.adapt.text_truncation import pool_type
from r1export.errors import Unsupported

AnyModule = Any  # an nn.Module of open_clip or timm whose parts are found by name: families have no type in common
Layer = nn.Linear | nn.Conv2d

ASIDE = {"stem", "downsample", "shortcut", "head"}  # parts of a tower between its blocks, or around one
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "c_proj"}  # of the attention pool of open_clip's ResNets


class Block(NamedTuple):
    """A residual block, or whatever else a tower repeats, and its name in the model."""

    name: str
    module: AnyModule


class BlockLayer(NamedTuple):
    """A linear or convolution of a block: `parent.name` is `layer`, and `path` leads to it from the block."""

    parent: nn.Module
    name: str
    path: str
    layer: Layer
    target: Target


def tower_of(model: AnyModule, tower: Tower) -> tuple[str, AnyModule]:
    """Prefix and module of a tower. A CLIP without `text` has its text tower spread over itself."""
    if tower == "visual":
        return "visual.", model.visual
    return ("text.", model.text) if hasattr(model, "text") else ("", model)


def chosen_blocks(model: AnyModule, tower: Tower, settings: PoolSettings) -> list[Block]:
    """The blocks of a tower that `settings.layers` names, or all of them. Below zero they count from the last: -1 is the last block.

    Raises Unsupported where a tower has no blocks or not that many, counted from 0.
    """
    blocks, layers = _blocks(model, tower), settings.layers
    if layers and max(layers) >= len(blocks):
        raise Unsupported(
            f"the {tower} tower has {len(blocks)} blocks, pool.layers contains {max(layers)}",
            "blocks are numbered from 0",
        )
    return [block for i, block in enumerate(blocks) if not layers or i in layers or i - len(blocks) in layers]


def _blocks(model: AnyModule, tower: Tower) -> list[Block]:
    prefix, module = tower_of(model, tower)
    if is_hf_tower(module):
        return [Block(f"{prefix}{name}", block) for name, block in hf_blocks(module)]
    parts = [
        (name, child)
        for name, child in module.named_children()
        if name not in ASIDE and not (prefix == "" and name == "visual")
    ]
    for repeats in (_is_list, _is_stage):
        blocks = [
            Block(f"{prefix}{name}.{block.name}".rstrip("."), block.module)
            for name, child in parts
            for block in _blocks_in(child, repeats, repeated=False)
        ]
        if blocks:
            break
    else:
        kind = type(getattr(module, "trunk", getattr(module, "transformer", module))).__name__
        raise Unsupported(
            f"the {tower} tower ({kind}) has no blocks with linears or convolutions that can be adapted",
            "remove the tower from pool.towers",
        )
    return blocks


def _blocks_in(module: nn.Module, repeats: Callable[[nn.Module], bool], *, repeated: bool) -> list[Block]:
    """The innermost children of what `repeats` that have layers to adapt, and an attention pool, named from `module`."""
    inner = [
        Block(f"{name}.{block.name}".rstrip("."), block.module)
        for name, child in module.named_children()
        if name not in ASIDE
        for block in _blocks_in(child, repeats, repeated=repeats(module))
    ]
    whole = is_attention_pool(module) or (repeated and _is_composed(module) and any(_layers_in(module)))
    return inner or ([Block("", module)] if whole else [])


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential | nn.ModuleList)


def _is_stage(module: nn.Module) -> bool:
    """Whether all children are of one kind: a stage that calls its blocks by name, as RegNet's do."""
    return len({type(child) for child in module.children()}) == 1


def _is_composed(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def is_attention_pool(module: nn.Module) -> bool:
    """Whether it is the attention that makes one embedding of a feature map in open_clip's ResNets."""
    return {name for name, _ in module.named_children()} == PROJECTIONS and hasattr(module, "positional_embedding")


def is_attention(module: AnyModule) -> bool:
    """Whether q, k and v are computed by linears of its own, packed or one for each."""
    if getattr(module, "in_proj_weight", None) is not None or isinstance(getattr(module, "qkv", None), nn.Linear):
        return True
    return all(isinstance(getattr(module, f"{name}_proj", None), nn.Linear) for name in "qkv")


def attentions(block: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """(parent, name of the child, path from the block) of every attention in a block."""
    for path, parent in block.named_modules():
        for name, child in parent.named_children():
            if is_attention(child):
                yield parent, name, f"{path}.{name}".lstrip(".")


def block_layers(block: nn.Module) -> list[BlockLayer]:
    """The layers of a block outside of its attentions, in order, with the target that names each.

    The last linear or pointwise convolution is "proj", those before it are "fc", larger kernels are "conv".
    """
    layers = list(_layers_in(block))
    pointwise = [found for found in layers if _is_pointwise(found[-1])]
    targets: dict[nn.Module, Target] = {layer: "conv" for *_, layer in layers}
    targets |= {layer: "fc" for *_, layer in pointwise[:-1]}
    targets |= {layer: "proj" for *_, layer in pointwise[-1:]}
    return [BlockLayer(*found, targets[found[-1]]) for found in layers]


def _layers_in(module: nn.Module, path: str = "") -> Iterator[tuple[nn.Module, str, str, Layer]]:
    """Everything in a block that can be adapted, outside of attentions, shortcuts and squeeze-excitation."""
    for name, child in module.named_children():
        where = f"{path}.{name}".lstrip(".")
        if _is_layer(child):
            yield module, name, where, child
        elif name not in ASIDE and not _is_squeeze_excite(child) and not is_attention(child):
            yield from _layers_in(child, where)


def _is_layer(module: nn.Module) -> TypeGuard[Layer]:
    """A linear, or a convolution of one group that multiplies by its weight as it is: no standardized weights."""
    if isinstance(module, nn.Linear):
        return True
    plain = isinstance(module, nn.Conv2d) and type(module) in (nn.Conv2d, Conv2dSame)
    return plain and bool(module.groups == 1) and module.padding_mode == "zeros"


def _is_squeeze_excite(module: nn.Module) -> bool:
    """Its layers see one value per channel and image."""
    parts = {name for name, _ in module.named_children()}
    return isinstance(module, SEModule | EffectiveSEModule) or parts >= {"conv_reduce", "conv_expand"}


def _is_pointwise(layer: Layer) -> bool:
    return isinstance(layer, nn.Linear) or layer.kernel_size == (1, 1)


def routing_token(model: AnyModule, tower: Tower, settings: PoolSettings) -> RoutingToken:
    """The first token where it stands for the input (a class token, a start token), else the mean of all.

    A text tower that reads its output at the end of the text can vote there as well (`pool.text_token` "end").
    """
    _, module = tower_of(model, tower)
    if is_hf_tower(module):
        return hf_routing_token(module, settings.text_token)
    if tower == "textual":
        return "mean" if pool_type(module) == "last" else "first" if settings.text_token == "start" else "end"
    token = getattr(getattr(module, "trunk", module), "cls_token", getattr(module, "class_embedding", None))
    return "mean" if token is None else "first"
