"""Put pools of rank-1 experts beside the linears of a CLIP, and take them out again.

    Y = X W^T + bias + pool(X)        for q, k, v, out of every attention and fc, proj of every MLP

A packed `in_proj_weight` or `qkv.weight` (3d, d) is three adapted linears: its rows 0:d, d:2d, 2d:3d. Families are told
apart by their parts, not by their names or versions.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from r1export.adapt.lora_layers import AnyModule, RankOneAttention, RankOneLinear, RankOnePacked
from r1export.adapt.pool import EndOfText, ExpertPool, PoolSettings
from r1export.adapt.text_truncation import pool_type, text_ends
from r1export.errors import Unsupported
from r1export.update.factors import ExpertUpdate, Factors, Rows

TARGETS = ("q", "k", "v", "out", "fc", "proj")


def _tower(model: AnyModule, name: str) -> tuple[str, AnyModule]:
    """Prefix and module of a tower. A CLIP without `text` has its text tower spread over itself."""
    if name == "visual":
        return "visual.", model.visual
    return ("text.", model.text) if hasattr(model, "text") else ("", model)


def _blocks(model: AnyModule, tower: str) -> list[tuple[str, AnyModule]]:
    """The residual blocks of a tower with their names: what has an attention `attn` and an MLP `mlp` of linears.

    Raises Unsupported where a tower has none, or where its attention sees windows instead of the image.
    """
    prefix, module = _tower(model, tower)
    found = [
        (prefix + name, block)
        for name, block in module.named_modules()
        if hasattr(block, "attn")
        and hasattr(block, "mlp")
        and len(_linears(block.mlp)) > 1
        and not (prefix == "" and name.startswith("visual."))
    ]
    kind = type(getattr(module, "trunk", getattr(module, "transformer", module))).__name__
    if not found:
        raise Unsupported(
            f"the {tower} tower ({kind}) has no transformer blocks", "use a ViT, or leave the tower out of pool.towers"
        )
    if any(hasattr(block, "window_size") or hasattr(block.attn, "relative_position_bias_table") for _, block in found):
        raise Unsupported(
            f"the {tower} tower ({kind}) attends within windows, so no token stands for the image",
            "leave the tower out of pool.towers",
        )
    return found


def _linears(mlp: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name, linear) of all linears of an MLP, in order; the last projects back, those before go forth."""
    return [
        (parent, name, child)
        for parent in mlp.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]


def _route_on(model: AnyModule, tower: str, text_token: str) -> str:
    """The first token where it stands for the input (a class token, a start token), else the mean of all.

    A text tower that reads its output at the end of the text can vote there as well (`text_token` "end").
    """
    _, module = _tower(model, tower)
    if tower == "text":
        return "mean" if pool_type(module) == "last" else {"start": "first", "end": "end"}[text_token]
    token = getattr(getattr(module, "trunk", module), "cls_token", getattr(module, "class_embedding", None))
    return "mean" if token is None else "first"


def inject_experts_(
    model: nn.Module,
    settings: PoolSettings,
    *,
    towers: tuple[str, ...] = ("visual", "text"),
    targets: tuple[str, ...] = TARGETS,
    layers: tuple[int, ...] = (),
    text_token: str = "start",
) -> dict[Rows, ExpertPool]:
    """Wrap the targeted linears of `model` in place; the new pools add nothing until they are trained.

    `layers` are the numbers of the blocks of each tower, from 0; empty takes all. `text_token` ("start", "end") votes for a text.

    Returns the pools by the rows of the parameter beside which they stand, sorted.

    Raises:
        Unsupported: a tower has no transformer blocks, or its attention is none that is known; the model is as it was.
    """
    pools: dict[Rows, ExpertPool] = {}
    try:
        for tower in towers:
            placed = replace(settings, route_on=_route_on(model, tower, text_token))
            for name, block in _chosen(_blocks(model, tower), layers, tower):
                _inject_attention_(block, f"{name}.attn", placed, targets, pools)
                _inject_mlp_(block.mlp, f"{name}.mlp", placed, targets, pools)
    except Unsupported:
        eject_experts_(model)
        raise
    ends = _watch_ends_(model) if any(pool.settings.route_on == "end" for pool in pools.values()) else EndOfText()
    for pool in pools.values():
        pool.train(model.training)
        pool.ends = ends
    return dict(sorted(pools.items()))


def _chosen(blocks: list[tuple[str, AnyModule]], layers: tuple[int, ...], tower: str) -> list[tuple[str, AnyModule]]:
    if layers and max(layers) >= len(blocks):
        raise Unsupported(
            f"the {tower} tower has {len(blocks)} blocks, pool.layers names {max(layers)}", "count blocks from 0"
        )
    return [block for i, block in enumerate(blocks) if not layers or i in layers]


def _watch_ends_(model: AnyModule) -> EndOfText:
    """Note where each text ends whenever tokens enter the text tower."""
    ends, tower = EndOfText(), _tower(model, "text")[1]

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        ends.positions = text_ends(tower, inputs[0])

    embedding = tower.token_embedding
    embedding.end_of_text = embedding.register_forward_pre_hook(note)
    return ends


def _inject_mlp_(
    mlp: nn.Module, name: str, settings: PoolSettings, targets: tuple[str, ...], pools: dict[Rows, ExpertPool]
) -> None:
    linears = _linears(mlp)
    names = {id(module): f"{name}.{path}".rstrip(".") for path, module in mlp.named_modules()}
    for target, wanted in (("fc", linears[:-1]), ("proj", linears[-1:])):
        if target in targets:
            for parent, child, linear in wanted:
                pool = pools[Rows(f"{names[id(linear)]}.weight", 0, linear.out_features)] = _pool(
                    linear.weight, settings
                )
                setattr(parent, child, RankOneLinear(linear, pool))


def _inject_attention_(
    block: AnyModule, name: str, settings: PoolSettings, targets: tuple[str, ...], pools: dict[Rows, ExpertPool]
) -> None:
    attention = block.attn
    if getattr(attention, "in_proj_weight", None) is not None:
        beside = _beside_packed(attention.in_proj_weight, f"{name}.in_proj_weight", settings, targets, pools)
        _refuse_unknown(attention, name)
        if "out" in targets:
            beside["out"] = pools[Rows(f"{name}.out_proj.weight", 0, attention.out_proj.out_features)] = _pool(
                attention.out_proj.weight, settings
            )
        if beside:
            block.attn = RankOneAttention(attention, beside)
        return
    if isinstance(getattr(attention, "qkv", None), nn.Linear):
        beside = _beside_packed(attention.qkv.weight, f"{name}.qkv.weight", settings, targets, pools)
        if beside:
            attention.qkv = RankOnePacked(attention.qkv, beside)
            if hasattr(
                attention, "qkv_bias_separate"
            ):  # else timm's EvaAttention takes the weight out of qkv and passes the pools by
                attention.qkv.separate, attention.qkv_bias_separate = attention.qkv_bias_separate, True
    elif not all(isinstance(getattr(attention, f"{target}_proj", None), nn.Linear) for target in "qkv"):
        raise Unsupported(
            f"{name} ({type(attention).__name__}) has no q, k and v to put experts beside",
            "leave the tower out of pool.towers",
        )
    for target, child in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "proj")):
        linear = getattr(attention, child, None)
        if target in targets and isinstance(linear, nn.Linear):
            pool = pools[Rows(f"{name}.{child}.weight", 0, linear.out_features)] = _pool(linear.weight, settings)
            setattr(attention, child, RankOneLinear(linear, pool))


def _refuse_unknown(attention: AnyModule, name: str) -> None:
    if not getattr(attention, "batch_first", True):
        raise Unsupported(f"{name} is not batch-first self-attention", "update open_clip_torch")
    if getattr(attention, "logit_scale", None) is not None:
        raise Unsupported(f"{name} is scaled cosine attention", "leave the tower out of pool.towers")


def _beside_packed(
    weight: Tensor, name: str, settings: PoolSettings, targets: tuple[str, ...], pools: dict[Rows, ExpertPool]
) -> dict[str, ExpertPool]:
    """A pool for each targeted third of the rows of a packed projection (3d, in)."""
    beside, height = {}, len(weight) // 3
    for i, target in enumerate("qkv"):
        if target in targets:
            beside[target] = pools[Rows(name, i * height, (i + 1) * height)] = _pool(weight[:height], settings)
    return beside


def _pool(weight: Tensor, settings: PoolSettings) -> ExpertPool:
    return ExpertPool(weight.shape[1], weight.shape[0], settings, device=weight.device, dtype=weight.dtype)


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


def pack_experts(pools: dict[Rows, ExpertPool], dtype: np.typing.DTypeLike = np.float32) -> ExpertUpdate:
    """The selected experts of every pool in float32 or float16, scaling and gate folded in, as they are merged and shipped."""
    factors = {}
    for rows, pool in pools.items():
        chosen, gate = pool.selected(), pool.frozen_gate()
        lora_A, lora_B = (
            tensor.detach().float().cpu().numpy()
            for tensor in (pool.lora_A[chosen], pool.lora_B[:, chosen] * gate[chosen])
        )
        factors[rows] = Factors.pack(lora_A, lora_B, pool.settings.scaling, dtype)
    return ExpertUpdate(factors)


@torch.no_grad()
def adopt_(pools: dict[Rows, ExpertPool], update: ExpertUpdate) -> None:
    """Give the selected experts the values that `pack_experts` rounded them to: the unmerged model is what is merged."""
    for rows, pool in pools.items():
        pair, chosen = update.factors[rows], pool.selected()
        u, v = (torch.from_numpy(values.astype(np.float32)).to(pool.lora_A) for values in (pair.u, pair.v))
        weight = pool.settings.scaling * pool.frozen_gate()[chosen]
        pool.lora_A[chosen], pool.lora_B[:, chosen] = v, u / weight.where(weight != 0, 1)


def remember_(pools: dict[Rows, ExpertPool], earlier: ExpertUpdate) -> None:
    """Give every pool the merged columns of B of all earlier tasks, for the orthogonality loss."""
    for rows, pool in pools.items():
        columns = earlier.factors[rows].u.astype(np.float32) / np.float32(pool.settings.scaling)
        pool.past = torch.from_numpy(columns).to(pool.lora_B)


def widen_spans_(pools: dict[Rows, ExpertPool], directions: dict[str, np.ndarray]) -> None:
    """Add the input directions (in, m) of an earlier task, by rows, to what the pools' orthogonality on the input side knows."""
    for rows, pool in pools.items():
        pool.span = torch.cat([pool.span, torch.from_numpy(directions[str(rows)]).to(pool.span)], 1)


def pool_tensors(pools: dict[Rows, ExpertPool]) -> dict[str, np.ndarray]:
    """A, B, router and counts of all pools, named `ROWS.lora_A` and so on: the unmerged model."""
    return {
        f"{rows}.{name}": tensor.detach().cpu().numpy()
        for rows, pool in pools.items()
        for name, tensor in pool.state_dict().items()
    }


def load_pool_tensors_(pools: dict[Rows, ExpertPool], tensors: dict[str, np.ndarray]) -> None:
    """Inverse of `pool_tensors`."""
    for rows, pool in pools.items():
        pool.load_state_dict(
            {name: torch.from_numpy(np.array(tensors[f"{rows}.{name}"])) for name in pool.state_dict()}
        )
