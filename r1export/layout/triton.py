"""Triton Inference Server: MODEL/config.pbtxt and MODEL/1/model.onnx for each tower.

Contract: Triton's model_config.proto (platform onnxruntime_onnx, dims without the batch).
"""

from __future__ import annotations

from onnx import ModelProto, TensorProto

from r1export.layout.content import LayoutContent, ReleaseSource, graph_bytes
from r1export.layout.graphs import accept_texts_
from r1export.update.release_layout import TEXTUAL, VISUAL, TowerFiles

MAX_BATCH = 64
TYPES = {TensorProto.FLOAT: "TYPE_FP32", TensorProto.INT64: "TYPE_INT64"}


def content(source: ReleaseSource, name: str) -> LayoutContent:
    """`name` begins the names of both models, by default `clip`."""
    prefix, graphs = name or "clip", numeric_graphs(source)
    made = {
        f"{prefix}_{tower.name}/config.pbtxt": _config(f"{prefix}_{tower.name}", graph).encode()
        for tower, graph in graphs.items()
    }
    made |= {f"{prefix}_{tower.name}/1/model.onnx": graph_bytes(graph) for tower, graph in graphs.items()}
    return LayoutContent({f"{prefix}_{tower.name}/1/{tower.weights}": tower.weights for tower in graphs}, made)


def numeric_graphs(source: ReleaseSource) -> dict[TowerFiles, ModelProto]:
    """The graphs of both towers for servers that keep versions in numbered folders."""
    texts = source.texts
    textual = accept_texts_(source.graph(TEXTUAL.graph), texts)
    return {VISUAL: source.graph(VISUAL.graph), TEXTUAL: textual}


def _config(name: str, graph: ModelProto) -> str:
    ends = "\n".join(
        f'{side} [\n  {{\n    name: "{value.name}"\n    data_type: {TYPES[value.type.tensor_type.elem_type]}\n'
        f"    dims: [ {', '.join(str(d.dim_value or -1) for d in value.type.tensor_type.shape.dim[1:])} ]\n  }}\n]"
        for side, values in (("input", graph.graph.input), ("output", graph.graph.output))
        for value in values
    )
    return f'name: "{name}"\nplatform: "onnxruntime_onnx"\nmax_batch_size: {MAX_BATCH}\n{ends}\n'
