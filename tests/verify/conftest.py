"""Small real graphs: two towers, each one linear and a norm, with their weights outside as in a release."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from r1export.update.container import Layout, plan, write_layout
from r1export.update.factors import ExpertUpdate, Factors, Rows

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
    batch: str | int = "batch", extra: tuple[onnx.NodeProto, ...] = (), epsilon: float = 1e-5
) -> onnx.ModelProto:
    """embeds = LayerNorm(relu(x W^T + b)), and `extra` nodes from `normed` to `embeds`."""
    layout = plan((name, value.dtype, value.shape) for name, value in weights_of().items())
    nodes = [
        helper.make_node("Gemm", ["x", "fc.weight", "fc.bias"], ["fc"], name="node_fc", transB=1),
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


@pytest.fixture
def write_graph(tmp_path: Path) -> Callable[..., Path]:
    """Writes a graph, with weights of its own beside it, into a folder of its own."""

    def write(folder: str, weights: dict[str, np.ndarray] | None = None, **options) -> Path:
        place, weights = tmp_path / folder, weights or weights_of()
        place.mkdir()
        layout = plan((name, value.dtype, value.shape) for name, value in weights.items())
        write_layout(place / "visual.safetensors", layout, lambda spec: weights[spec.name])
        (place / "visual.onnx").write_bytes(small_graph(**options).SerializeToString())
        return place / "visual.onnx"

    return write


@pytest.fixture
def x() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).normal(size=(2, WIDTH)).astype(np.float32)}


@pytest.fixture
def update() -> ExpertUpdate:
    rng = np.random.default_rng(2)
    factors = Factors(
        (0.1 * rng.normal(size=(WIDTH, 3))).astype(np.float32), rng.normal(size=(3, WIDTH)).astype(np.float32)
    )
    return ExpertUpdate({Rows("fc.weight", 0, WIDTH): factors})
