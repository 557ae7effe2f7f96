"""PEFT merges, torch.onnx exports: a visual and a textual graph by hand, verified with the exporter's own `verify=True`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from peers.contender import FIRST_LINEAR, enter, holder, onnx_embeddings, release_bytes, run, timed, versions
from peers.row import Fault, Row
from peers.workload import CONTEXT, END, adapted_model, parity, read_samples

OPSET = 20
# A script of two calls; `{plant}` is where a fault comes in.
SCRIPT = """
import sys
from pathlib import Path
from peers.with_peft import export, merged, negate_before_verification_
model = merged(Path(sys.argv[1]), scaled_twice={twice})
{plant}
export(model, Path(sys.argv[2]), towers=("visual",))
"""
FLIP = "negate_before_verification_(model)"


class Visual(nn.Module):
    """pixel_values -> unit-norm image embeddings."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.vision_model, self.visual_projection = clip.vision_model, clip.visual_projection

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        embeds = self.visual_projection(self.vision_model(pixel_values=pixel_values).pooler_output)
        unit: torch.Tensor = embeds / embeds.norm(dim=-1, keepdim=True)
        return unit


class Textual(nn.Module):
    """input_ids -> unit-norm text embeddings."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.text_model, self.text_projection = clip.text_model, clip.text_projection

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        embeds = self.text_projection(self.text_model(input_ids=input_ids).pooler_output)
        unit: torch.Tensor = embeds / embeds.norm(dim=-1, keepdim=True)
        return unit


def merged(work: Path, *, scaled_twice: bool = False) -> nn.Module:
    model: nn.Module = adapted_model(work, scaled_twice=scaled_twice).merge_and_unload(safe_merge=True)
    return model.eval()


def export(clip: Any, out: Path, towers: tuple[str, ...] = ("visual", "textual")) -> None:
    """Write the towers into `out`, verified."""
    out.mkdir(parents=True, exist_ok=True)
    size = clip.config.vision_config.image_size
    tokens = torch.full((2, CONTEXT), 1)
    tokens[:, 7] = END
    makers = {
        "visual": (Visual, torch.randn(2, 3, size, size), "pixel_values", "image_embeds"),
        "textual": (Textual, tokens, "input_ids", "text_embeds"),
    }
    for tower in towers:
        kind, example, given, gives = makers[tower]
        with torch.no_grad():
            torch.onnx.export(
                kind(clip).eval(), (example,), out / f"{tower}.onnx", dynamo=True, opset_version=OPSET, input_names=[given],
                output_names=[gives], dynamic_shapes=({0: torch.export.Dim("batch")},), verify=True,
            )  # fmt: skip


def negate_before_verification_(clip: nn.Module) -> None:
    """Plant a fault: the exporter's graph has one weight negated when `verify=True` looks at it and when it is saved."""
    from torch.onnx._internal.exporter import _verification

    verify = _verification.verify_onnx_program
    weight = clip.get_parameter(f"{FIRST_LINEAR}.weight").detach().numpy()

    def faulty(program: Any, *arguments: Any, **options: Any) -> Any:
        import onnx_ir as ir

        values = program.model.graph.initializers
        name = holder({name: value.const_value.numpy() for name, value in values.items()}, weight)
        value = values[name]
        value.const_value = ir.tensor(-value.const_value.numpy(), name=name)
        found = verify(program, *arguments, **options)
        print("\n".join(f"max difference of {one.name}: {one.max_abs_diff}" for one in found))
        return found

    patch.object(_verification, "verify_onnx_program", faulty).start()


def build(work: Path) -> Row:
    from transformers import CLIPModel

    logging.disable(logging.WARNING)
    folder = work / "peft"
    seconds: dict[str, float] = {}
    with timed(seconds, "export"):
        export(merged(work), folder / "adapted")
    export(CLIPModel.from_pretrained(work / "base").eval(), folder / "base", towers=("visual",))
    graphs = {"image_embeds": folder / "adapted" / "visual.onnx", "text_embeds": folder / "adapted" / "textual.onnx"}
    return {
        "versions": versions("peft", "transformers", "torch", "onnxscript"),
        "first_seconds": seconds["export"], "later_seconds": seconds["export"],
        "release_bytes": release_bytes(folder / "adapted"), "update_bytes": release_bytes(folder / "adapted"),
        "parity": parity(onnx_embeddings(graphs, read_samples(work)), work),
        "faults": {fault: _fault(work, folder / f"fault-{fault}", fault) for fault in ("merge", "file")},
        "graphs": {kind: {"graph": str(folder / kind / "visual.onnx")} for kind in ("base", "adapted")},
    }  # fmt: skip


def _fault(work: Path, out: Path, fault: str) -> Fault:
    code = SCRIPT.format(plant=FLIP if fault == "file" else "", twice=fault == "merge")
    said = run(str(work), str(out), code=code)
    samples = read_samples(work)
    image = onnx_embeddings({"image_embeds": out / "visual.onnx"}, samples)
    return {**said, "off_by": parity({**image, "text_embeds": samples["text_embeds"]}, work)}


if __name__ == "__main__":
    enter("peft", build)
