"""Checkpoints of other programs in the key layout of open_clip: transformers' CLIPModel and SiglipModel, wrappers, extra keys.

Only names and shapes change, no number: every function takes and returns tensors by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from torch import Tensor

State = dict[str, Tensor]

WRAPPERS = ("state_dict.", "module.", "_orig_mod.", "model.")  # what trainers and torch.compile put before every name
OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")  # sizes that OpenAI keeps among the weights
_BUFFERS = re.compile(r"(^|\.)position_ids$")  # of older versions of transformers: 0, 1, 2, ...

_BLOCK = (
    (".self_attn.out_proj.", ".attn.out_proj."), (".layer_norm1.", ".ln_1."), (".layer_norm2.", ".ln_2."), (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)  # fmt: skip
_TIMM_BLOCK = ((".self_attn.out_proj.", ".attn.proj."), (".layer_norm1.", ".norm1."), (".layer_norm2.", ".norm2."))
_QKV = re.compile(r"(.+\.layers\.\d+\.self_attn\.)([qkv])_proj\.(weight|bias)")

_TEXT = (
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_model.encoder.layers.", "transformer.resblocks."),
)
_CLIP_VISION = (
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    ("visual_projection.weight", "visual.proj"),
    ("text_projection.weight", "text_projection"),
)
_SIGLIP_VISION = (
    ("vision_model.embeddings.patch_embedding.", "visual.trunk.patch_embed.proj."),
    ("vision_model.embeddings.position_embedding.weight", "visual.trunk.pos_embed"),
    ("vision_model.post_layernorm.", "visual.trunk.norm."),
    ("vision_model.encoder.layers.", "visual.trunk.blocks."),
    ("vision_model.head.probe", "visual.trunk.attn_pool.latent"),
    ("vision_model.head.attention.out_proj.", "visual.trunk.attn_pool.proj."),
    ("vision_model.head.layernorm.", "visual.trunk.attn_pool.norm."),
    ("vision_model.head.mlp.", "visual.trunk.attn_pool.mlp."),
    ("text_model.head.", "text_projection."),
)
_POOL_IN = re.compile(r"vision_model\.head\.attention\.in_proj_(weight|bias)")


def to_open_clip(state: Mapping[str, Tensor], model: Any) -> State:
    """The tensors of a checkpoint by the names that `model`, one of open_clip's, has for them; unknown names stay as they are."""
    plain = without_wrappers(state)
    if any(name.startswith(("text_model.", "vision_model.")) for name in plain):
        plain = _from_transformers(plain)
    plain = dict(convert_state_dict(model, plain))  # Apple's MobileCLIP
    if "positional_embedding" in plain and not hasattr(model, "positional_embedding"):
        plain = convert_to_custom_text_state_dict(plain)
    known = model.state_dict()
    for name in ("logit_scale", "logit_bias"):
        if name in plain and name in known and plain[name].ndim <= 1 and plain[name].numel() == 1:
            plain[name] = plain[name].reshape(
                known[name].shape
            )  # a scalar or a row of one, as versions of open_clip differ
    return {name: tensor for name, tensor in plain.items() if name in known or not _superfluous(name)}


def without_wrappers(state: Mapping[str, Tensor]) -> State:
    """Without the prefixes that all names share, or that mark the model among other things that a trainer keeps."""
    plain = dict(state)
    for _ in range(2 * len(WRAPPERS)):  # they may be nested
        wrapper = next((prefix for prefix in WRAPPERS if _wraps(prefix, plain)), None)
        if wrapper is None:
            break
        plain = {name.removeprefix(wrapper): tensor for name, tensor in plain.items() if name.startswith(wrapper)}
    return plain


def has_openai_extras(names: Iterable[str]) -> bool:
    """Whether these are the names of a checkpoint that OpenAI published, or of a copy of one."""
    return set(OPENAI_EXTRAS) <= set(names)


def _wraps(prefix: str, names: Iterable[str]) -> bool:
    wrapped = [name.startswith(prefix) for name in names]
    return any(wrapped) and (all(wrapped) or prefix == "state_dict.")


def _superfluous(name: str) -> bool:
    return name in OPENAI_EXTRAS or bool(_BUFFERS.search(name))


def _from_transformers(state: State) -> State:
    """CLIPModel or SiglipModel: linears q, k and v become one, projections are transposed or renamed."""
    siglip = "vision_model.head.probe" in state
    vision, block = (_SIGLIP_VISION, _TIMM_BLOCK) if siglip else (_CLIP_VISION, _BLOCK)
    packed = _packed(state, siglip)
    converted: State = {}
    for name, tensor in packed.items():
        new = _renamed(name, (*_TEXT, *vision))
        in_timm = new.startswith("visual.trunk.")
        new = _renamed_inside(new, block if in_timm else _BLOCK)
        converted[new] = tensor.T if new in ("visual.proj", "text_projection") else tensor
    if "visual.trunk.pos_embed" in converted and converted["visual.trunk.pos_embed"].ndim == 2:
        converted["visual.trunk.pos_embed"] = converted["visual.trunk.pos_embed"][None]
    return _as_custom_text(converted) if siglip else converted


def _packed(state: State, siglip: bool) -> State:
    """q, k and v of each attention as one tensor; that of SigLIP's pooling as q and kv."""
    packed: State = {}
    for name, tensor in state.items():
        if match := _QKV.fullmatch(name):
            base, part, kind = match.groups()
            timm = siglip and name.startswith("vision_model.")
            key = f"{base.replace('self_attn', 'attn')}{'qkv.' if timm else 'in_proj_'}{kind}"
            if part == "q":
                packed[key] = torch.cat([state.get(f"{base}{each}_proj.{kind}", tensor) for each in "qkv"])
        elif match := _POOL_IN.fullmatch(name):
            width = len(tensor) // 3
            packed[f"visual.trunk.attn_pool.q.{match[1]}"] = tensor[:width]
            packed[f"visual.trunk.attn_pool.kv.{match[1]}"] = tensor[width:]
        else:
            packed[name] = tensor
    return packed


def _as_custom_text(state: State) -> State:
    """With the text tower's names below `text.`, as in a CustomTextCLIP."""
    top = ("visual.", "text.", "logit_")
    return {name if name.startswith(top) else f"text.{name}": tensor for name, tensor in state.items()}


def _renamed(name: str, table: Iterable[tuple[str, str]]) -> str:
    return next((new + name[len(old) :] for old, new in table if name.startswith(old)), name)


def _renamed_inside(name: str, table: Iterable[tuple[str, str]]) -> str:
    for old, new in table:
        name = name.replace(old, new)
    return name
