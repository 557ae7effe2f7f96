"""Base models of other families, small and with random weights, as people bring them: a folder with a config, weights and a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_tokenizers import KINDS, write_hub_tokenizer
from safetensors.torch import save_file

from r1export.adapt.model_config import read_model_config

NATIVE_VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {
    "vocab_size": 1000,
    "width": 32,
    "heads": 2,
    "layers": 2,
    "pool_type": "last",
    "no_causal_mask": True,
    "hf_tokenizer_name": "local",
}
SIGLIP2 = {
    "embed_dim": 96,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit3", "timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none"},
    "text_cfg": TEXT | {"context_length": 16, "proj_bias": True, "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}},
}  # fmt: skip
CLIPA = {
    "embed_dim": 24,
    "vision_cfg": NATIVE_VIT | {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
    "text_cfg": TEXT | {"context_length": 16},
}
ROBERTA = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": NATIVE_VIT,
    "text_cfg": {
        "context_length": 16, "hf_tokenizer_name": "local", "hf_model_name": "roberta", "hf_pooler_type": "mean_pooler",
        "hf_model_config": {
            "model_type": "roberta", "vocab_size": 1000, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 64, "max_position_embeddings": 24, "type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
        },
    },
}  # fmt: skip
SQUASHED = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "SigLIP2": ("gemma", SIGLIP2, SQUASHED),
    "CLIPA": ("bert", CLIPA, SQUASHED | {"interpolation": "bilinear"}),
    "roberta": ("roberta", ROBERTA, {"resize_mode": "shortest"}),
}
"""Name -> kind of tokenizer, `model_cfg` and `preprocess_cfg`."""


def write_family(name: str, folder: Path) -> Path:
    """A folder that `base.model = "local-dir:..."` takes."""
    kind, model, preprocess = FAMILIES[name]
    skip_without_transformers(name)
    model = model | {"text_cfg": model["text_cfg"] | {"tokenizer_kwargs": KINDS[kind][2]}}
    write_hub_tokenizer(kind, folder)
    config = folder / "open_clip_config.json"
    config.write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}), encoding="utf-8")
    torch.manual_seed(0)
    save_file(read_model_config(config).build().state_dict(), folder / "open_clip_model.safetensors")
    return folder


def family_recipe(folder: Path) -> str:
    """A recipe of one task on the base model in `folder`."""
    return (
        f'[base]\nmodel = "local-dir:{folder}"\n[[tasks]]\nname = "digits"\nsource = "builtin:digits"\n'
        "[train]\nlearning_rate = 5e-3\n[pool]\nalpha = 12.0\n"
    )


def skip_without_transformers(family: str) -> None:
    if "hf_model_name" in FAMILIES[family][1]["text_cfg"]:
        pytest.importorskip("transformers", reason="a text tower of transformers: pip install 'r1export[hf]'")
