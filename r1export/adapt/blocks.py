"""The parts of a CLIP that can get experts: towers, their residual blocks, the linears of an MLP, the token that votes.

Families of models are recognized by their parts, not by their names or versions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from r1export.adapt.pool import PoolSettings, RoutingToken, Tower
from r1export.adapt.text_truncation import pool_type
from r1export.errors import Unsupported

AnyModule = Any  # an nn.Module of open_clip or timm whose parts are found by name: families have no type in common


class Block(NamedTuple):
    """A residual block, a module with an attention `attn` and an MLP `mlp`, and its name in the model."""

    name: str
    module: AnyModule


class MlpLinear(NamedTuple):
    """A linear of an MLP: `parent.name` is `linear`, and `path` leads to it from the MLP."""

    parent: nn.Module
    name: str
    path: str
    linear: nn.Linear


def tower_of(model: AnyModule, tower: Tower) -> tuple[str, AnyModule]:
    """Prefix and module of a tower. A CLIP without `text` has its text tower spread over itself."""
    if tower == "visual":
        return "visual.", model.visual
    return ("text.", model.text) if hasattr(model, "text") else ("", model)


def chosen_blocks(model: AnyModule, tower: Tower, settings: PoolSettings) -> list[Block]:
    """The blocks of a tower that `settings.layers` names, or all of them.

    Raises Unsupported where a tower has no blocks or not that many, or where its attention sees windows instead of the image.
    """
    blocks, layers = _blocks(model, tower), settings.layers
    if layers and max(layers) >= len(blocks):
        raise Unsupported(
            f"the {tower} tower has {len(blocks)} blocks, pool.layers names {max(layers)}", "count blocks from 0"
        )
    return [block for i, block in enumerate(blocks) if not layers or i in layers]


def _blocks(model: AnyModule, tower: Tower) -> list[Block]:
    prefix, module = tower_of(model, tower)
    blocks = [
        Block(prefix + name, block)
        for name, block in module.named_modules()
        if hasattr(block, "attn")
        and hasattr(block, "mlp")
        and len(mlp_linears(block.mlp)) > 1
        and not (prefix == "" and name.startswith("visual."))
    ]
    kind = type(getattr(module, "trunk", getattr(module, "transformer", module))).__name__
    if not blocks:
        raise Unsupported(
            f"the {tower} tower ({kind}) has no transformer blocks", "use a ViT, or leave the tower out of pool.towers"
        )
    if any(_sees_windows(block.module) for block in blocks):
        raise Unsupported(
            f"the {tower} tower ({kind}) attends within windows, so no token stands for the image",
            "leave the tower out of pool.towers",
        )
    return blocks


def _sees_windows(block: AnyModule) -> bool:
    return hasattr(block, "window_size") or hasattr(block.attn, "relative_position_bias_table")


def mlp_linears(mlp: nn.Module) -> list[MlpLinear]:
    """All linears of an MLP, in order; the last projects back, those before go forth."""
    return [
        MlpLinear(parent, name, f"{path}.{name}".lstrip("."), child)
        for path, parent in mlp.named_modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]


def routing_token(model: AnyModule, tower: Tower, settings: PoolSettings) -> RoutingToken:
    """The first token where it stands for the input (a class token, a start token), else the mean of all.

    A text tower that reads its output at the end of the text can vote there as well (`pool.text_token` "end").
    """
    _, module = tower_of(model, tower)
    if tower == "textual":
        return "mean" if pool_type(module) == "last" else "first" if settings.text_token == "start" else "end"
    token = getattr(getattr(module, "trunk", module), "cls_token", getattr(module, "class_embedding", None))
    return "mean" if token is None else "first"
