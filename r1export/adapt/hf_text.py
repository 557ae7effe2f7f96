"""Text towers of transformers that open_clip wraps (roberta, xlm-roberta, bert, mt5, m2m_100): their blocks and linears by name."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.hf_model import ClsLastHiddenStatePooler, ClsPooler, HFTextEncoder
from torch import nn

from r1export.adapt.pool_settings import RoutingToken, Target
from r1export.errors import InputError, Unsupported, first_line

_REMEDY = "set base.tokenizer to the tokenizer of this model"

# How paths end in a block, with the target that names the linear; an earlier one wins.
TARGETS: tuple[tuple[str, Target], ...] = (
    ("attention.output.dense", "out"), ("intermediate.dense", "fc"), ("output.dense", "proj"),
    ("query", "q"), ("key", "k"), ("value", "v"), ("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "out"),
    ("SelfAttention.q", "q"), ("SelfAttention.k", "k"), ("SelfAttention.v", "v"), ("SelfAttention.o", "out"),
    ("wi_0", "fc"), ("wi_1", "fc"), ("wi", "fc"), ("wo", "proj"), ("fc1", "fc"), ("fc2", "proj"),
)  # fmt: skip


def is_hf_tower(tower: nn.Module) -> bool:
    """Whether this text tower is one of transformers."""
    return isinstance(tower, HFTextEncoder)


def hf_blocks(tower: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name in the tower, block) of what its first list of modules repeats. Raises Unsupported if it has none."""
    for path, module in tower.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            return [(f"{path}.{i}", block) for i, block in enumerate(module)]
    raise Unsupported("the text tower (transformers) has no list of blocks", "remove it from pool.towers")


def hf_layers(block: nn.Module) -> list[tuple[nn.Module, str, str, nn.Linear, Target]]:
    """(parent, name of the child, path from the block, linear, target) of a block of such a tower; none of any other block."""
    if not type(block).__module__.startswith("transformers."):
        return []
    found = []
    for path, parent in block.named_modules():
        for name, child in parent.named_children():
            full = f"{path}.{name}".lstrip(".")
            if isinstance(child, nn.Linear) and (target := _target(full)):
                found.append((parent, name, full, child, target))
    return found


def hf_routing_token(tower: Any, text_token: str) -> RoutingToken:
    """The first token where the tower reads its output there, else the mean of all.

    Raises Unsupported for `pool.text_token` "end": such a tower sees the whole text at every token.
    """
    if text_token == "end":
        raise Unsupported(
            "text towers of transformers have no end token that alone sees the whole text",
            'set pool.text_token = "start"',
        )
    return "first" if isinstance(tower.pooler, ClsPooler | ClsLastHiddenStatePooler) else "mean"


def check_hf_tower(origin: str, model: Any, tokenizer: Any) -> None:
    """Whether a text tower of transformers reads what its tokenizer gives: it leaves out pads by their id, and has a row for each token.

    Raises InputError. Other towers are not looked at.
    """
    tower = getattr(model, "text", None)
    if not isinstance(tower, HFTextEncoder):
        return
    pads = tower.config.pad_token_id, tokenizer.pad_id
    if pads[0] != pads[1]:
        raise InputError(
            f"{origin}: the text tower's pad token is {pads[0]}, the tokenizer pads with {pads[1]}", _REMEDY
        )
    if tower.vocab_size < tokenizer.rows:
        raise InputError(
            f"{origin}: the text tower has {tower.vocab_size} token embeddings, the tokenizer needs {tokenizer.rows}",
            _REMEDY,
        )
    try:
        with torch.no_grad():
            model.encode_text(
                torch.full((1, tokenizer.context_length), tokenizer.rows - 1, device=model.logit_scale.device)
            )
    except (IndexError, RuntimeError) as error:
        raise InputError(
            f"{origin}: the text tower fails with {tokenizer.context_length} tokens: {first_line(error)}",
            "set text_cfg.context_length as in training",
        ) from error


def _target(path: str) -> Target | None:
    return next((target for end, target in TARGETS if path == end or path.endswith(f".{end}")), None)
