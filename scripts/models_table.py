"""Writes docs/models.md: which open_clip models can be taught, merged, exported and verified, each tried out.

    python scripts/models_table.py [NAME ...]        default: one of every family that open_clip has

Each is built with random weights and two layers (the structure decides, not the depth), taught at random, merged by the
one merge, exported, and compared with torch at a batch that the exporter did not see. Takes about a minute a model.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import open_clip
import timm
import torch
from torch import nn

from r1export.adapt.inject import eject_experts_, inject_experts_
from r1export.adapt.pack import pack_experts
from r1export.errors import Unsupported
from r1export.export.graph import export_graphs
from r1export.export.towers import float_tensors
from r1export.pipeline.context import pool_settings
from r1export.recipe import Pool
from r1export.update.container import write_layout
from r1export.verify.runtimes.runtime import open_session

DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"
FAMILIES = (
    "ViT-B-32", "ViT-B-16-quickgelu", "ViT-S-32", "ViT-M-16-alt", "ViT-L-14", "ViT-H-14", "ViT-L-14-CLIPA", "ViT-H-14-worldwide",
    "coca_ViT-B-32", "coca_base", "ViT-B-16-SigLIP", "ViT-B-16-SigLIP2", "ViT-SO400M-16-SigLIP-i18n-256", "MobileCLIP-B", "MobileCLIP2-L-14",
    "PE-Core-T-16-384", "PE-Core-B-16", "EVA01-g-14", "EVA02-B-16", "ViTamin-S", "vit_medium_patch16_gap_256", "vit_relpos_medium_patch16_cls_224",
    "RN50", "convnext_tiny", "MobileCLIP-S1", "swin_base_patch4_window7_224", "roberta-ViT-B-32", "nllb-clip-base",
)  # fmt: skip
DEPTH, VOCABULARY, SAMPLES = 2, 600, 3
LIMIT = 5e-6  # max-abs on unit-norm embeddings in float32


@dataclass(frozen=True)
class Row:
    """What was found out about one model."""

    name: str
    verdict: str
    routed: str = ""
    linears: int = 0
    merge: float = 0.0
    export: float = 0.0
    seconds: float = 0.0

    def markdown(self) -> str:
        if not self.linears:
            return f"| {self.name} | {self.verdict} | | | | |"
        return (
            f"| {self.name} | {self.verdict} | {self.routed} | {self.linears} | {self.merge:.1e} | {self.export:.1e} |"
        )


def build(name: str) -> nn.Module:
    """The model with random weights, two layers a tower and a small vocabulary."""
    config = copy.deepcopy(open_clip.get_model_config(name))
    vision, text = config["vision_cfg"], config["text_cfg"]
    if isinstance(vision.get("layers"), int):
        vision["layers"] = DEPTH
    text |= {} if "hf_model_name" in text else {"layers": DEPTH, "vocab_size": VOCABULARY}
    if "multimodal_cfg" in config:
        config["multimodal_cfg"]["layers"] = 1
    custom = config.pop("custom_text", False) or "hf_model_name" in text
    kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    with patch.object(timm, "create_model", _shallow(timm.create_model)):
        return kind(**config).eval().requires_grad_(False)


def _shallow(create):
    def shallow(name: str, **options):
        try:
            return create(name, depth=DEPTH, **options)
        except TypeError:  # not every architecture has one number for its depth
            return create(name, **options)

    return shallow


def examine(name: str) -> Row:
    """Teach, merge, export and compare one model."""
    start = time.perf_counter()
    torch.manual_seed(0)
    try:
        model = build(name)
    except RuntimeError as error:
        return Row(name, f"refused: {str(error).splitlines()[0]}")
    verdict, towers = "supported", ("visual", "textual")
    try:
        pools = inject_experts_(model, replace(pool_settings(Pool()), alpha=12.0, towers=towers))
    except Unsupported as reason:
        verdict, towers = f"supported for the text tower only: {reason.message}", ("textual",)
        pools = inject_experts_(model, replace(pool_settings(Pool()), alpha=12.0, towers=towers))
    inputs = _inputs(model)
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
    errors = [
        max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))
        for one, other in ((unmerged, merged), (merged, exported))
    ]
    if max(errors) > LIMIT:
        verdict = f"refused: differs by {max(errors):.1e}"
    routed = ", ".join(
        sorted({f"{'image' if r.parameter.startswith('visual.') else 'text'}: {p.route_on}" for r, p in pools.items()})
    )
    return Row(name, verdict, routed, len(pools), *errors, time.perf_counter() - start)


def _inputs(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    size, context = model.visual.image_size, getattr(model, "text", model).context_length
    tokens = torch.randint(1, VOCABULARY - 1, (SAMPLES, context))
    tokens[:, context // 2] = VOCABULARY - 1
    return torch.randn(SAMPLES, 3, *(size if isinstance(size, tuple) else (size, size))), tokens


@torch.no_grad()
def _encode(model: nn.Module, inputs: tuple[torch.Tensor, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    return model.encode_image(inputs[0], normalize=True).numpy(), model.encode_text(inputs[1], normalize=True).numpy()


def _export(model: nn.Module, inputs: tuple[torch.Tensor, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = export_graphs(model, tuple(inputs[0].shape[2:]), inputs[1].shape[1], folder, opset=20)
        values = {n: t.detach().numpy() for n, t in float_tensors(model).items()}
        for file in weights.files:
            stored = weights.stored(file, values)
            write_layout(folder / file, weights.layout(file), lambda spec, stored=stored: stored[spec.name])
        feeds = (("visual", "pixel_values", inputs[0]), ("textual", "input_ids", inputs[1]))
        return tuple(
            open_session(folder / f"{tower}.onnx").run(None, {key: value.numpy()})[0] for tower, key, value in feeds
        )


HEAD = """# Models

Written by `scripts/models_table.py`. One model of each family that open_clip {version} has (timm {timm}, torch {torch}) was built
with random weights and two layers a tower, taught at random, merged by the one merge, exported at opset 20 and run in
onnxruntime. Towers are told apart by their parts, not by their names, so other sizes of a family behave the same.

*merge*: unmerged torch against merged torch. *export*: merged torch against onnxruntime. Both are max-abs on unit-norm
embeddings of three images and three texts; the limit is {limit}. *votes*: the token on which experts are routed.

| model | verdict | votes | adapted linears | merge | export |
|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=FAMILIES)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = []
    for name in options.names:
        rows.append(examine(name))
        print(rows[-1].markdown(), f"{rows[-1].seconds:.0f} s", file=sys.stderr, flush=True)
    head = HEAD.format(
        version=open_clip.__version__, timm=timm.__version__, torch=torch.__version__.split("+")[0], limit=LIMIT
    )
    tail = (DOCUMENT.read_text(encoding="utf-8").partition("\n## ")[2]) if DOCUMENT.exists() else ""
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(
        head + "\n".join(row.markdown() for row in rows) + "\n" + (f"\n## {tail}" if tail else ""), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
