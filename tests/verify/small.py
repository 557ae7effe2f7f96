"""A small real graph, one linear and a norm, and its weights."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from r1export.update.container import Layout, plan

WIDTH = 6


def weights_of(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "fc.weight": rng.normal(size=(WIDTH, WIDTH)).astype(np.float32),
        "fc.bias": rng.normal(size=WIDTH).astype(np.float32),
    }


def external(name: str, layout: Layout) -> TensorProto:
    spec = layout.by_name[name]
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=spec.shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "visual.safetensors"), ("offset", spec.offset), ("length", spec.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def small_graph(
    batch: str | int = "batch", extra: tuple[onnx.NodeProto, ...] = (), epsilon: float = 1e-5, turned: bool = False
) -> onnx.ModelProto:
    """embeds = LayerNorm(relu(x W^T + b)), and `extra` nodes from `normed` to `embeds`; W is stored as (in, out) if `turned`."""
    layout = plan((name, value.dtype, value.shape) for name, value in weights_of().items())
    linear = [helper.make_node("Gemm", ["x", "fc.weight", "fc.bias"], ["fc"], name="node_fc", transB=1)]
    if turned:
        linear = [
            helper.make_node("MatMul", ["x", "fc.weight"], ["product"], name="node_product"),
            helper.make_node("Add", ["product", "fc.bias"], ["fc"], name="node_fc"),
        ]
    nodes = [
        *linear,
        helper.make_node("Relu", ["fc"], ["act"], name="node_relu"),
        helper.make_node(
            "LayerNormalization",
            ["act", "ones", "zeros"],
            ["normed" if extra else "embeds"],
            name="node_norm",
            epsilon=epsilon,
        ),
        *extra,
    ]
    constants = [
        numpy_helper.from_array(np.full(WIDTH, value, np.float32), name) for name, value in (("ones", 1), ("zeros", 0))
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, WIDTH]) for name in ("x", "embeds")]
    graph = helper.make_graph(
        nodes, "g", ends[:1], ends[1:], [external(name, layout) for name in weights_of()] + constants
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
