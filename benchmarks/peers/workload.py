"""What every contender gets: one CLIP with random weights, one LoRA, the same inputs and the outputs of the unmerged model.

    WORK/base/             transformers' CLIPModel                    WORK/open_clip.{json,safetensors}   the same weights
    WORK/adapter/          PEFT's LoRA on q, k, v, out, fc1, fc2      WORK/samples.npz                    inputs, outputs

Random weights are fine for structure, speed and rounding, never for accuracy. No model hub is asked.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

Size = Mapping[str, int]
SIZES: dict[str, Size] = {
    "ViT-B-32": {
        "image": 224, "patch": 32, "embed": 512, "layers": 12, "vision_width": 768, "vision_heads": 12, "text_width": 512, "text_heads": 8,
    },
    "quick": {
        "image": 64, "patch": 16, "embed": 64, "layers": 2, "vision_width": 128, "vision_heads": 2, "text_width": 64, "text_heads": 2,
    },
}  # fmt: skip
RANK, ALPHA = 4, 8.0  # scaling = ALPHA / RANK = 2, so that scaling twice is a fault
TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
CONTEXT, VOCABULARY, END = 77, 49408, 49407
SAMPLES = 8
SAME = 1e-5  # largest difference of unit-norm embeddings between the two libraries on the same weights


class Facts(TypedDict):
    """What facts.json says of the models."""

    size: str
    disagreement: float
    moved_by_adapter: float
    adapter_values: int


def prepare(size: str, work: Path, seed: int = 0) -> None:
    """Write all of it into `work`. Raises AssertionError if transformers and open_clip disagree about the weights."""
    import torch
    from safetensors.numpy import load_file, save_file

    from peers.mapping import to_open_clip

    torch.manual_seed(seed)
    model = _clip(SIZES[size])
    model.save_pretrained(work / "base")
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    save_file(to_open_clip(state), work / "open_clip.safetensors")
    (work / "open_clip.json").write_text(json.dumps(open_clip_config(SIZES[size])), encoding="utf-8")
    inputs = samples(SIZES[size], seed)
    disagreement = _largest(embeddings(model, inputs), _open_clip_embeddings(work, inputs))
    assert disagreement < SAME, f"transformers and open_clip differ by {disagreement:.1e} on the same weights"
    adapted = _lora(model, seed)
    adapted.save_pretrained(work / "adapter")
    unmerged = embeddings(adapted, inputs)
    np.savez(work / "samples.npz", **inputs, **unmerged)  # type: ignore[arg-type]  # stubs: allow_pickle
    factors = load_file(work / "adapter" / "adapter_model.safetensors")
    facts: Facts = {
        "size": size,
        "disagreement": disagreement,
        "moved_by_adapter": _largest(unmerged, embeddings_without(adapted, inputs)),
        "adapter_values": sum(value.size for value in factors.values()),
    }
    (work / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def _clip(size: Size) -> Any:
    from transformers import CLIPConfig, CLIPModel

    shared = {"num_hidden_layers": size["layers"], "hidden_act": "gelu", "projection_dim": size["embed"]}
    vision, text = (
        {
            "hidden_size": size[f"{tower}_width"],
            "intermediate_size": 4 * size[f"{tower}_width"],
            "num_attention_heads": size[f"{tower}_heads"],
            **shared,
        }
        for tower in ("vision", "text")
    )
    vision |= {"image_size": size["image"], "patch_size": size["patch"]}
    text |= {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "bos_token_id": END - 1, "eos_token_id": END}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=size["embed"])).eval()


def open_clip_config(size: Size) -> dict[str, Any]:
    """The same shape as open_clip's model config."""
    return {
        "embed_dim": size["embed"],
        "vision_cfg": {
            "image_size": size["image"], "patch_size": size["patch"], "layers": size["layers"], "width": size["vision_width"],
            "head_width": size["vision_width"] // size["vision_heads"],
        },
        "text_cfg": {
            "context_length": CONTEXT, "vocab_size": VOCABULARY, "layers": size["layers"], "width": size["text_width"], "heads": size["text_heads"],
        },
    }  # fmt: skip


def samples(size: Size, seed: int) -> dict[str, np.ndarray]:
    """`pixel_values` (n, 3, h, w) and `input_ids` (n, 77), each text with one end."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((SAMPLES, CONTEXT), np.int64)
    for row in tokens:
        length = int(rng.integers(5, 20))
        row[:length] = [END - 1, *rng.integers(1, END - 1, length - 2), END]
    return {
        "pixel_values": rng.standard_normal((SAMPLES, 3, size["image"], size["image"])).astype(np.float32),
        "input_ids": tokens,
    }


def _lora(model: Any, seed: int) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=int(ALPHA), lora_dropout=0.0, target_modules=list(TARGETS))
    adapted = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            spread = parameter.shape[1] ** -0.5 if "lora_A" in name else 0.02
            parameter.data.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return adapted


def adapted_model(work: Path, *, scaled_twice: bool = False) -> Any:
    """PEFT's model of `work`, unmerged. `scaled_twice` is the planted fault: the scaling counts once too often."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import CLIPModel

    model = PeftModel.from_pretrained(CLIPModel.from_pretrained(work / "base"), work / "adapter").eval()
    for module in model.modules() if scaled_twice else ():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= ALPHA / RANK
    return model


def read_samples(work: Path) -> dict[str, np.ndarray]:
    """Inputs, and `image_embeds` and `text_embeds` of the unmerged model, unit-norm."""
    with np.load(work / "samples.npz") as stored:
        return {name: stored[name] for name in stored.files}


def embeddings(model: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Unit-norm embeddings (n, D) by transformers' CLIPModel, with or without PEFT around it."""
    import torch

    with torch.inference_mode():
        found = model(**{name: torch.from_numpy(inputs[name]) for name in ("pixel_values", "input_ids")})
    return {name: unit(getattr(found, name).numpy()) for name in ("image_embeds", "text_embeds")}


def embeddings_without(adapted: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same with the adapter off."""
    with adapted.disable_adapter():
        return embeddings(adapted, inputs)


def _open_clip_embeddings(work: Path, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    import torch

    from r1export.adapt.clip import load_clip
    from r1export.adapt.preprocess_settings import OPENAI

    model = load_clip(weights=work / "open_clip.safetensors", config=work / "open_clip.json", preprocess=OPENAI).model
    with torch.inference_mode():
        image, text = (
            encode(torch.from_numpy(inputs[name]), normalize=True).numpy()
            for encode, name in ((model.encode_image, "pixel_values"), (model.encode_text, "input_ids"))
        )
    return {"image_embeds": image, "text_embeds": text}


def unit(embeds: np.ndarray) -> np.ndarray:
    """Rows scaled to length one."""
    return np.asarray(embeds / np.linalg.norm(embeds, axis=1, keepdims=True))


def _largest(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    return max(float(np.abs(one[name] - other[name]).max()) for name in ("image_embeds", "text_embeds"))


def parity(found: Mapping[str, np.ndarray], work: Path) -> float:
    """Largest difference of unit-norm embeddings from the unmerged torch model."""
    return _largest({name: unit(value) for name, value in found.items()}, read_samples(work))


if __name__ == "__main__":
    prepare(sys.argv[1], Path(sys.argv[2]))
