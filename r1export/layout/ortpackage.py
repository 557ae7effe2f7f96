"""A model package of onnxruntime 1.32: manifest.json, and for each component its variants.

Contract: onnxruntime 1.32, ModelPackageContext; unknown keys are refused by it. Our own manifest.json has the same name, so
the package is a folder of its own.
"""

from __future__ import annotations

from r1export.layout.content import LayoutContent, ReleaseSource, graph_bytes, tokenizer_files
from r1export.layout.graphs import accept_texts_
from r1export.update.atomic_io import json_bytes
from r1export.update.release_layout import TEXTUAL, VISUAL

VARIANT = "fp32-cpu"
MODEL = "model.onnx"


def content(source: ReleaseSource, name: str) -> LayoutContent:
    """`name` is the package's name, by default `clip`."""
    texts, manifest = source.texts, source.release.manifest
    graphs = {
        VISUAL: source.graph(VISUAL.graph),
        TEXTUAL: accept_texts_(source.graph(TEXTUAL.graph), texts),
    }
    made = {
        "manifest.json": json_bytes(
            {
                "schema_version": "1.0",
                "package_name": name or "clip",
                "package_version": f"{manifest.sequence}",
                "components": {tower.name: f"models/{tower.name}" for tower in graphs},
                "additional_metadata": {"base": manifest.base.name},
            }
        )
    }
    files: dict[str, str] = {}
    for tower, graph in graphs.items():
        folder = f"models/{tower.name}"
        made[f"{folder}/component.json"] = json_bytes(_component(tower.name))
        made[f"{folder}/{VARIANT}/{MODEL}"] = graph_bytes(graph)
        files[f"{folder}/{VARIANT}/{tower.weights}"] = tower.weights
    return LayoutContent(files | tokenizer_files(source, f"models/{TEXTUAL.name}/{VARIANT}/"), made)


def _component(name: str) -> dict[str, object]:
    variant = {
        "ep": "CPUExecutionProvider",
        "device": "cpu",
        "executor_info": {"ort": {"model_file": MODEL}},
    }
    return {"component_name": name, "variants": {VARIANT: variant}, "additional_metadata": {}}
