"""The same CLIP under two sets of names: transformers' CLIPModel and open_clip's CLIP.

    transformers                                     open_clip
    vision_model.encoder.layers.N.self_attn.q_proj   visual.transformer.resblocks.N.attn.in_proj, first third of the rows
    text_model.encoder.layers.N.mlp.fc1              transformer.resblocks.N.mlp.c_fc
    visual_projection.weight (D, width)              visual.proj (width, D), transposed

Needs numpy alone. That both compute the same is checked by `peers.workload`, with the models themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

TOWERS = {"vision_model": "visual.", "text_model": ""}
BLOCK = re.compile(r"(vision_model|text_model)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
IN_BLOCK = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
THIRDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUTSIDE = {
    "logit_scale": "logit_scale",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
TRANSPOSED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}


def to_open_clip(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state_dict of transformers' CLIPModel as one of open_clip's CLIP. Raises KeyError for a name it does not know."""
    found: dict[str, np.ndarray] = {}
    thirds: dict[str, dict[int, np.ndarray]] = {}
    for name, value in state.items():
        if name.endswith("position_ids"):
            continue
        if name in OUTSIDE:
            found[OUTSIDE[name]] = value
        elif name in TRANSPOSED:
            found[TRANSPOSED[name]] = np.ascontiguousarray(value.T)
        else:
            parameter, third = parameter_of(name)
            if third is None:
                found[parameter] = value
            else:
                thirds.setdefault(parameter, {})[third] = value
    return found | {name: np.concatenate([parts[i] for i in range(3)]) for name, parts in thirds.items()}


def parameter_of(name: str) -> tuple[str, int | None]:
    """open_clip's parameter for one of a block, and which third of its rows it is, None for all of them."""
    match = BLOCK.fullmatch(name)
    if not match:
        raise KeyError(f"{name} is no parameter of transformers' CLIPModel")
    tower, layer, inside, kind = match.groups()
    block = f"{TOWERS[tower]}transformer.resblocks.{layer}"
    if inside in THIRDS:
        return f"{block}.attn.in_proj_{kind}", THIRDS.index(inside)
    return f"{block}.{IN_BLOCK[inside]}.{kind}", None


def rows_of(module: str, outputs: int) -> tuple[str, int, int]:
    """open_clip's parameter and rows for the weight of one of transformers' linears with `outputs` rows."""
    parameter, third = parameter_of(f"{module}.weight")
    start = (third or 0) * outputs
    return parameter, start, start + outputs
