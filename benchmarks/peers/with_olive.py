"""Olive: OnnxConversion of a PEFT model with its adapter merged, and OnnxDiscrepancyCheck, its check against torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peers.contender import (
    FIRST_LINEAR,
    cut_image_tower,
    enter,
    flip_sign,
    onnx_embeddings,
    release_bytes,
    run,
    timed,
    versions,
)  # fmt: skip
from peers.row import Fault, Row, Said
from peers.workload import adapted_model, parity, read_samples

OPSET = 20
CONVERT = {"type": "OnnxConversion", "target_opset": OPSET, "use_dynamo_exporter": True, "merge_adapter_weights": True}
EXTRACT = {"type": "ExtractAdapters", "make_inputs": True, "save_format": "onnx_adapter"}
MAX_ERROR = 1e-3
BOTH = ("image_embeds", "text_embeds")
# `olive run`, with every adapter that PEFT loads scaled once too often.
TWICE = """
import sys
import peft
from peft.tuners.lora import LoraLayer
load = peft.PeftModel.from_pretrained
def faulty(*arguments, **options):
    model = load(*arguments, **options)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= module.lora_alpha["default"] / module.r["default"]
    return model
peft.PeftModel.from_pretrained = faulty
"""
RUN = """
import sys
from olive.cli.launcher import main
main(["run", "--config", sys.argv[1]])
"""


def build(work: Path) -> Row:
    from olive.workflows import run as run_workflow

    folder = work / "olive"
    seconds: dict[str, float] = {}
    with timed(seconds, "export"):
        run_workflow(config(work, folder / "adapted", {"convert": CONVERT}))
    run_workflow(config(work, folder / "base", {"convert": CONVERT}, adapted=False))
    graph, samples = folder / "adapted" / "model.onnx", read_samples(work)
    size = release_bytes(*graph.parent.glob("model.onnx*"))
    return {
        "versions": versions("olive-ai", "peft", "transformers", "torch", "onnxscript"),
        "first_seconds": seconds["export"], "later_seconds": seconds["export"], "release_bytes": size, "update_bytes": size,
        "parity": parity(onnx_embeddings(dict.fromkeys(BOTH, graph), samples), work),
        "check_on_the_sound_model": checked(work, folder / "check-sound", graph),
        "faults": faults(work, folder, graph),
        "graphs": {
            kind: {"graph": str(cut_image_tower(folder / kind / "model.onnx", folder / f"{kind}-image.onnx"))} for kind in ("base", "adapted")
        },
    }  # fmt: skip


def config(work: Path, out: Path, passes: dict[str, Any], *, adapted: bool = True) -> dict[str, Any]:
    """A workflow over the base with the adapter; its cache is its own, so that nothing is taken from an earlier one."""
    model = {"type": "HfModel", "model_path": str(work / "base"), "task": "zero-shot-image-classification"}
    model |= {"adapter_path": str(work / "adapter")} if adapted else {}
    return {"input_model": model, "passes": passes, "output_dir": str(out), "cache_dir": f"{out}-cache"}


def discrepancy_check(work: Path) -> dict[str, Any]:
    return {"type": "OnnxDiscrepancyCheck", "reference_model_path": str(work / "base"), "max_mae": MAX_ERROR}


def checked(work: Path, out: Path, graph: Path) -> Said:
    """What OnnxDiscrepancyCheck says of a graph."""
    settings = config(work, out, {"check": discrepancy_check(work)})
    settings["input_model"] = {"type": "ONNXModel", "model_path": str(graph)}
    return started(out, settings)


def started(out: Path, settings: dict[str, Any], code: str = RUN) -> Said:
    """`olive run` in a process of its own."""
    path = out.parent / f"{out.name}.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return run(str(path), code=code)


def faults(work: Path, folder: Path, graph: Path) -> dict[str, Fault]:
    """A merge with the scaling twice through the conversion; a sound graph with one weight negated afterwards."""
    samples = read_samples(work)
    twice = folder / "fault-merge"
    made = started(twice, config(work, twice, {"convert": CONVERT}), TWICE + RUN)
    assert made["exit_code"] == 0, made["said"]
    checks = {"merge": checked(work, folder / "check-merge", twice / "model.onnx")}
    damaged = folder / "fault-file" / "model.onnx"
    damaged.parent.mkdir()
    damaged.write_bytes(graph.read_bytes())
    for data in graph.parent.glob("model.onnx.data"):
        (damaged.parent / data.name).write_bytes(data.read_bytes())
    weight = adapted_model(work).merge_and_unload().get_submodule(FIRST_LINEAR).weight.detach().numpy()
    flip_sign(damaged, weight)
    checks["file"] = checked(work, folder / "check-file", damaged)
    found: dict[str, Fault] = {}
    for fault, said in checks.items():
        off = onnx_embeddings(dict.fromkeys(BOTH, folder / f"fault-{fault}" / "model.onnx"), samples)
        found[fault] = {**said, "off_by": parity(off, work)}
    return found


if __name__ == "__main__":
    enter("olive", build)
