"""Writes docs/models.md: which open_clip and timm models can be adapted, merged, exported and verified, each tried out.

    python scripts/models_table.py [NAME ...]        default: one of every family; with names, only their rows are updated
    python scripts/models_table.py --full NAME ...   as deep as the models are; the rows are printed and not written

Each is built with random weights and two layers where it has one number for them (the structure decides, not the depth),
brought into its deployed form, given random experts, merged by the one merge, exported, and compared with torch at a batch
that the exporter did not see. Takes about a minute a model.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import open_clip
import timm
import torch
from torch import nn

from r1export.adapt.clip import ClipModel
from r1export.adapt.deployed_form import deploy_
from r1export.adapt.hf_text import is_hf_tower
from r1export.adapt.inject import eject_experts_, inject_experts_
from r1export.adapt.model_config import ModelConfig
from r1export.adapt.pack import pack_experts
from r1export.errors import Unsupported
from r1export.export.graph import export_graphs
from r1export.export.towers import float_tensors
from r1export.pipeline.context import pool_settings
from r1export.recipe import Pool
from r1export.update.container import write_tensors
from r1export.verify.runtimes.runtime import open_session

DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"
FAMILIES = (
    "ViT-B-32", "ViT-B-16-quickgelu", "ViT-S-32", "ViT-M-16-alt", "ViT-L-14", "ViT-H-14", "ViT-L-14-CLIPA", "ViT-H-14-worldwide",
    "coca_ViT-B-32", "coca_base", "ViT-B-16-SigLIP", "ViT-B-16-SigLIP2", "ViT-SO400M-16-SigLIP-i18n-256", "MobileCLIP-B", "MobileCLIP2-L-14",
    "PE-Core-T-16-384", "PE-Core-B-16", "EVA01-g-14", "EVA02-B-16", "ViTamin-S", "vit_medium_patch16_gap_256", "vit_relpos_medium_patch16_cls_224",
    "RN50", "RN101", "convnext_tiny", "convnext_base", "MobileCLIP-S1", "MobileCLIP-S2", "MobileCLIP2-S0", "MobileCLIP2-S2",
    "MobileCLIP2-S3", "MobileCLIP2-S4", "swin_base_patch4_window7_224", "roberta-ViT-B-32", "nllb-clip-base",
)  # fmt: skip
OF_TIMM = (
    "tf_efficientnet_lite0", "efficientnet_b0", "mobilenetv3_large_100", "mobilenetv4_conv_small", "mobilenetv4_hybrid_medium",
    "fastvit_t8", "mobileone_s0", "repvit_m0_9", "regnety_002", "resnet18",
)  # fmt: skip
DEPTH, VOCABULARY, SAMPLES = 2, 600, 3
SIZE = 224  # pixels, of models of timm
TRANSFORMERS = {  # in place of the hub's configs: their kinds and widths, two layers, a small vocabulary
    "roberta": {"model_type": "roberta", "vocab_size": VOCABULARY, "num_hidden_layers": DEPTH, "max_position_embeddings": 514, "type_vocab_size": 1},
    "nllb": {
        "model_type": "m2m_100", "vocab_size": VOCABULARY, "d_model": 1024, "encoder_layers": DEPTH, "decoder_layers": 1,
        "encoder_attention_heads": 16, "decoder_attention_heads": 16, "encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096,
    },
}  # fmt: skip
LIMIT = 5e-6  # max-abs on unit-norm embeddings in float32


@dataclass(frozen=True)
class Row:
    """What was found out about one model."""

    name: str
    verdict: str
    routed: str = ""
    image: int = 0
    text: int = 0
    deployed: float | None = None
    merge: float = 0.0
    export: float = 0.0
    seconds: float = 0.0

    def markdown(self) -> str:
        if not self.routed:
            return f"| {self.name} | {self.verdict} | | | | | | |"
        folded = "-" if self.deployed is None else f"{self.deployed:.1e}"
        figures = f"{self.image} | {self.text} | {folded} | {self.merge:.1e} | {self.export:.1e}"
        return f"| {self.name} | {self.verdict} | {self.routed} | {figures} |"


def build(name: str, *, full: bool = False) -> ClipModel:
    """The model with random weights, its BatchNorms as if they had seen images; two layers a tower and a small vocabulary if not `full`."""
    model = open_clip.create_model(name, load_weights=False).eval().requires_grad_(False) if full else _build(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def _build(name: str) -> ClipModel:
    config = copy.deepcopy(open_clip.get_model_config(name)) or {
        "embed_dim": 512,
        "vision_cfg": {"timm_model_name": name, "timm_pool": "avg", "timm_proj": "", "image_size": SIZE},
        "text_cfg": {"context_length": 77, "width": 512, "heads": 8},
    }
    vision, text = config["vision_cfg"], config["text_cfg"]
    if isinstance(vision.get("layers"), int):
        vision["layers"] = DEPTH
    if "hf_model_name" in text:
        transformer = next(each for part, each in TRANSFORMERS.items() if part in text["hf_model_name"])
        return ModelConfig(name, name, config, transformer=transformer).build().eval().requires_grad_(False)
    text |= {"layers": DEPTH, "vocab_size": VOCABULARY}
    if "multimodal_cfg" in config:
        config["multimodal_cfg"]["layers"] = 1
    custom = config.pop("custom_text", False)
    kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    with patch.object(timm, "create_model", _shallow(timm.create_model)):
        return kind(**config).eval().requires_grad_(False)


def _shallow(create: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def shallow(name: str, **options: Any) -> nn.Module:
        try:
            return create(name, depth=DEPTH, **options)
        except (TypeError, AssertionError):  # not every architecture has one number for its depth
            return create(name, **options)

    return shallow


def examine(name: str, *, full: bool = False) -> Row:
    """Adapt, merge, export and compare one model."""
    start = time.perf_counter()
    torch.manual_seed(0)
    try:
        model = build(name, full=full)
    except (RuntimeError, Unsupported) as error:
        return Row(name, f"refused: {str(error).splitlines()[0]}")
    inputs = _inputs(model)
    verdict = "supported with `r1export[hf]`" if is_hf_tower(_text_tower(model)) else "supported"
    settings, original = replace(pool_settings(Pool()), alpha=12.0), _encode(model, inputs)
    folded = deploy_(model.visual, _image_size(inputs[0]))
    deployed = _difference(original, _encode(model, inputs)) if folded else None
    try:
        pools = inject_experts_(model, settings)
    except Unsupported:  # it has no pointwise layers in its blocks
        verdict = "supported with `conv` among pool.targets"
        pools = inject_experts_(model, replace(settings, targets=(*settings.targets, "conv")))
    generator = torch.Generator().manual_seed(0)
    for pool in pools.values():
        pool.reset_(generator)
        pool.lora_B.data.copy_(torch.randn(pool.lora_B.shape, generator=generator) * 0.05)
        pool.counts.copy_(torch.randint(0, 50, pool.counts.shape, generator=generator))
        pool.freeze_()
    unmerged, update = _encode(model, inputs), pack_experts(pools)
    eject_experts_(model)
    tensors = float_tensors(model)
    for parameter, value in update.apply({n: t.detach().numpy() for n, t in tensors.items()}).items():
        tensors[parameter].data.copy_(torch.from_numpy(value))
    merged = _encode(model, inputs)
    try:
        exported = _export(model, inputs)
    except Unsupported as reason:
        return Row(name, f"refused: {reason.message}")
    errors = _difference(unmerged, merged), _difference(merged, exported)
    if max(errors) > LIMIT:
        verdict = f"refused: differs by {max(errors):.1e}"
    images = [rows.parameter.startswith("visual.") for rows in pools]
    routed = ", ".join(
        sorted({f"{'image' if r.parameter.startswith('visual.') else 'text'}: {p.route_on}" for r, p in pools.items()})
    )
    counts = sum(images), len(images) - sum(images)
    return Row(name, verdict, routed, *counts, deployed, *errors, time.perf_counter() - start)


Embeddings = tuple[np.ndarray, np.ndarray]


def _difference(left: Embeddings, right: Embeddings) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(left, right, strict=True))


def _text_tower(model: ClipModel) -> Any:
    """The model itself where its text tower is not a module of its own."""
    return model.text if hasattr(model, "text") else model


def _inputs(model: ClipModel) -> tuple[torch.Tensor, torch.Tensor]:
    size, context = model.visual.image_size, min(77, _text_tower(model).context_length)
    tokens = torch.randint(1, VOCABULARY - 1, (SAMPLES, context))
    tokens[:, context // 2] = VOCABULARY - 1
    return torch.randn(SAMPLES, 3, *(size if isinstance(size, tuple) else (size, size))), tokens


def _image_size(pixels: torch.Tensor) -> tuple[int, int]:
    _, _, height, width = pixels.shape
    return height, width


@torch.no_grad()
def _encode(model: ClipModel, inputs: tuple[torch.Tensor, torch.Tensor]) -> Embeddings:
    return model.encode_image(inputs[0], normalize=True).numpy(), model.encode_text(inputs[1], normalize=True).numpy()


def _export(model: ClipModel, inputs: tuple[torch.Tensor, torch.Tensor]) -> Embeddings:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = export_graphs(model, _image_size(inputs[0]), inputs[1].shape[1], folder, opset=20)
        values = {n: t.detach().numpy() for n, t in float_tensors(model).items()}
        for file in weights.files:
            write_tensors(folder / file, weights.stored(file, values))
        feeds = (("visual", "pixel_values", inputs[0]), ("textual", "input_ids", inputs[1]))
        return tuple(
            open_session(folder / f"{tower}.onnx").run(None, {key: value.numpy()})[0] for tower, key, value in feeds
        )


HEAD = """# Supported models and runtimes

Written by `scripts/models_table.py`. One model of each family that open_clip {version} has, and ten towers that it does not list by
`base.config` with a name of timm {timm} (torch {torch}), were built with random weights (two layers per tower where one number sets the depth),
brought into their deployed form, given random experts, merged, exported at opset 20 and run in
onnxruntime. Towers are recognized by their parts, not by their names, so other sizes of a family behave the same.

*image*, *text*: adapted layers of each tower with the default targets. *folded*: the original model against its deployed form, - if
there is nothing to fold. *merge*: unmerged torch against merged torch. *export*: merged torch against onnxruntime. All are max-abs on
unit-norm embeddings of three images and three texts; the limit of the last two is {limit}. *votes*: the token on which experts are routed.

| model | verdict | votes | image | text | folded | merge | export |
|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=(*FAMILIES, *OF_TIMM))
    parser.add_argument("--full", action="store_true", help="models at their full depth; print the rows, write nothing")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    for name in options.names:
        row = examine(name, full=options.full)
        print(row.markdown(), f"{row.seconds:.0f} s", file=sys.stderr, flush=True)
        if not options.full:
            write(row)


def write(row: Row) -> None:
    """Put one row into the document, whose other rows and sections stay."""
    head, _, tail = DOCUMENT.read_text(encoding="utf-8").partition("\n## ")
    rows = {line.split(" | ")[0][2:]: line for line in head.splitlines() if line.startswith("| ")} | {
        row.name: row.markdown()
    }
    torch_version = torch.__version__.split("+")[0]
    head = HEAD.format(version=open_clip.__version__, timm=timm.__version__, torch=torch_version, limit=LIMIT)
    lines = [rows[name] for name in (*FAMILIES, *OF_TIMM) if name in rows]
    DOCUMENT.write_text(head + "\n".join(lines) + "\n\n## " + tail, encoding="utf-8")


if __name__ == "__main__":
    main()
