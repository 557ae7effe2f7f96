"""The image tower of `builtin:photo-vit`: a vision transformer with a class token, on the feature maps of EfficientNet-Lite0.

A model of timm's own parts, registered with timm so that an open_clip config can name it. Its weights file has the
transformer alone; the convolutions below it and the text tower are those of `builtin:photo` (scripts/make_photo_vit.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

import timm
from timm.layers import HybridEmbed
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model

Value = TypeVar("Value")

NAME = "vit_photo_lite0_128"
SHAPE = {"img_size": 128, "patch_size": 1, "embed_dim": 256, "depth": 4, "num_heads": 4}  # 4 x 4 tokens of 32 pixels
LAST_STAGE = 4  # of EfficientNet-Lite0: 320 channels at 1/32 of the image's size
EXTENDS = "extends"  # metadata of a weights file: name of the file beside it that has the rest
TRUNK, BACKBONE = "visual.trunk.", "visual.trunk.patch_embed.backbone."
STEM = tuple(f"{TRUNK}{part}." for part in ("conv_stem", "bn1", "blocks"))  # what EfficientNet-Lite0 has below its head

default_cfgs = generate_default_cfgs({NAME: {"input_size": (3, 128, 128)}})  # timm looks for it under this name


@register_model
def vit_photo_lite0_128(pretrained: bool = False, **settings: Any) -> VisionTransformer:
    """Four blocks of width 256 with a class token; `settings` are VisionTransformer's. Raises ValueError if `pretrained`."""
    if pretrained:
        raise ValueError(f"timm has no weights of {NAME}: use base.model = 'builtin:photo-vit'")
    backbone = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(LAST_STAGE,))
    model: VisionTransformer = build_model_with_cfg(
        VisionTransformer, NAME, pretrained, embed_layer=partial(HybridEmbed, backbone=backbone), **SHAPE | settings
    )
    return model


def with_photo(transformer: Mapping[str, Value], photo: Mapping[str, Value]) -> dict[str, Value]:
    """All tensors of `builtin:photo-vit` by their names in open_clip: its own, and the stem and the text tower of `builtin:photo`."""
    stem = {BACKBONE + name.removeprefix(TRUNK): value for name, value in photo.items() if name.startswith(STEM)}
    text = {name: value for name, value in photo.items() if not name.startswith("visual.")}
    return {**stem, **text, **transformer}
