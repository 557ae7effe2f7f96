"""OpenVINO Model Server: MODEL/1/model.onnx for each tower, and config.json that lists them.

Contract: OpenVINO Model Server, `model_config_list`; paths are those next to config.json.
"""

from __future__ import annotations

from r1export.layout.content import LayoutContent, ReleaseSource, graph_bytes
from r1export.layout.triton import numeric_graphs
from r1export.update.atomic_io import json_bytes


def content(source: ReleaseSource, name: str) -> LayoutContent:
    """`name` begins the names of both models, by default `clip`."""
    prefix, graphs = name or "clip", numeric_graphs(source)
    models = [f"{prefix}_{tower.name}" for tower in graphs]
    made = {f"{prefix}_{tower.name}/1/model.onnx": graph_bytes(graph) for tower, graph in graphs.items()}
    made["config.json"] = json_bytes(
        {"model_config_list": [{"config": {"name": model, "base_path": model}} for model in models]}
    )
    return LayoutContent({f"{prefix}_{tower.name}/1/{tower.weights}": tower.weights for tower in graphs}, made)
