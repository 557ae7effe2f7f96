"""open_clip itself: open_clip_config.json and open_clip_model.safetensors, for `local-dir:` and as a base model of a new run.

Contract: open_clip 3.x, factory.py (`local-dir:`). Weights are stored as open_clip names and shapes them, so this is the one
layout that does not share the release's bytes.
"""

from __future__ import annotations

from r1export.errors import Unsupported
from r1export.layout.content import LayoutContent, ReleaseSource, tokenizer_files
from r1export.update.atomic_io import json_bytes

WEIGHTS = "open_clip_model.safetensors"  # written by update/open_clip_weights.py


def content(source: ReleaseSource, name: str) -> LayoutContent:
    """`name` is not used. Raises Unsupported for weights that open_clip has no model for."""
    manifest, config = source.release.manifest, source.open_clip_config
    if manifest.base.deployed_form:
        raise Unsupported(
            f"{manifest.name}: the image tower is in its deployed form, which open_clip can't build",
            "fine-tune a base model without BatchNorm, or use another layout",
        )
    if manifest.precision != "fp32":
        raise Unsupported(f"{manifest.name} is {manifest.precision}, expected fp32", "use the fp32 release")
    text = config["model_cfg"]["text_cfg"]
    if isinstance(text, dict) and text.get("hf_model_name"):
        raise Unsupported("open_clip downloads text towers of transformers from a hub", "use another layout")
    own = not (isinstance(text, dict) and text.get("hf_tokenizer_name"))
    files = {} if own else tokenizer_files(source)  # CLIP's own tokenizer is part of open_clip
    return LayoutContent(files, {"open_clip_config.json": json_bytes(config)}, (WEIGHTS,))
