"""The int8 variant: every linear of a block multiplies 8-bit integers, static scales, one for each row of a weight.

    x ~ input_scale * (q - input_zero_point), q uint8        W ~ scale[:, None] * q, q int8 (update/int8.py)

Protected, because they are small or read rather than multiplied: biases, norms and positions in float32; patch and token
embeddings and the last projection in float16. Attention itself stays in float32. The ranges of the inputs come from a
calibration of the base model and are part of its weights file, so they stay when weights are merged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from r1export.export.graph import write_graph
from r1export.export.weight_map import Placement, WeightMap, place_
from r1export.update.release_layout import GRAPHS, TOWERS, WEIGHTS
from r1export.update.run_layout import WEIGHT_MAP

SCALE, INPUT_SCALE, INPUT_ZERO = ".scale", ".input_scale", ".input_zero_point"
SMALL = 1 << 12  # elements: a smaller weight costs more in extra nodes than it saves in bytes
BATCH = 8  # inputs run at a time while calibrating
Ranges = Mapping[str, tuple[float, float]]


def calibrate(release: Path, inputs: Mapping[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """Smallest and largest value at the input of every linear that will be quantised, by the name of its weight.

    `release` is a float32 folder of graphs with the base's weights; `inputs` are pixel_values (n, 3, H, W) and input_ids
    (n, L) of the tasks at hand.
    """
    ranges: dict[str, tuple[float, float]] = {}
    for tower in TOWERS:
        model = ir.load(release / tower.graph)
        watched = {node.inputs[1].name: node.inputs[0] for node in _linears(model.graph)}
        distinct = list(dict.fromkeys(watched.values()))
        if not distinct:
            continue
        session = _session_with_outputs(model, distinct, release)
        seen: dict[str, list[Any]] = {value.name: [] for value in distinct}
        for start in range(0, len(inputs[tower.input]), BATCH):
            feeds = {tower.input: inputs[tower.input][start : start + BATCH]}
            for name, output in zip(seen, session.run(list(seen), feeds), strict=True):
                seen[name].append((output.min(), output.max()))
        for weight, value in watched.items():
            low, high = np.array(seen[value.name], np.float64).T
            ranges[weight] = float(low.min()), float(high.max())
    return ranges


def _session_with_outputs(model: ir.Model, values: list[ir.Value], folder: Path) -> ort.InferenceSession:
    model = model.clone()
    by_name = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(
        by_name[value.name] for value in values if by_name[value.name] not in model.graph.outputs
    )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def input_scale(low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Scale (float32) and zero point (uint8) of a range that is widened to hold zero, both scalars."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255) if high > low else np.float32(1)
    return np.array(scale, np.float32), np.array(np.clip(np.rint(-low / np.float64(scale)), 0, 255), np.uint8)


def quantized_graphs(graphs: Path, folder: Path) -> WeightMap:
    """Write the int8 form of all graphs of `graphs` into `folder`, with their weight_map.json; no weight is looked at."""
    single = WeightMap.read(graphs / WEIGHT_MAP)
    models = {name: ir.load(graphs / name) for name in GRAPHS}
    files: dict[str, tuple[Placement, ...]] = {}
    for tower in TOWERS:
        placed = single.files[tower.weights]
        files[tower.weights] = tuple(q for p in placed for q in _placements(p, models[tower.graph].graph))
    weights = WeightMap(files).sorted()
    for name, model in models.items():
        _quantize_(model.graph, {p.parameter: p for p in weights.files[WEIGHTS[name]]})
        place_(model.graph, weights, WEIGHTS[name])
        write_graph(model, folder / name)
    weights.write(folder / WEIGHT_MAP)
    return weights


def _linears(graph: ir.Graph) -> list[ir.Node]:
    """The Gemms by a large weight that is stored as torch has it, rows first."""
    return [
        n
        for n in graph
        if n.op_type == "Gemm"
        and n.attributes["transB"].value == 1
        and _is_weight(n.inputs[1])
        and n.inputs[1].const_value.size >= SMALL
    ]


def _is_weight(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and isinstance(value.const_value, ir.ExternalTensor)


def _placements(placement: Placement, graph: ir.Graph) -> list[Placement]:
    name, shape = placement.parameter, placement.shape
    if any(node.inputs[1].name == name for node in _linears(graph)):
        extra = [
            Placement(name + SCALE, shape[:1]),
            Placement(name + INPUT_SCALE, ()),
            Placement(name + INPUT_ZERO, (), dtype="U8"),
        ]
        return [Placement(name, shape[::-1], transposed=True, dtype="I8"), *extra]
    embedding = name in graph.initializers and any(
        node.op_type in ("Conv", "Gather", "MatMul", "Gemm") for node in graph.initializers[name].consumers()
    )
    return (
        [Placement(name, shape, placement.transposed, "F16")]
        if embedding and len(shape) > 1 and np.prod(shape) >= SMALL
        else [placement]
    )


def _quantize_(graph: ir.Graph, placements: Mapping[str, Placement]) -> None:
    for node in _linears(graph):
        _quantize_linear_(graph, node)
    for name, value in list(graph.initializers.items()):
        placement = placements.get(name)
        if placement is not None and placement.dtype == "F16":
            _widen_(graph, value)


def _quantize_linear_(graph: ir.Graph, node: ir.Node) -> None:
    """Gemm (x, W, b) -> Add (MatMul (DQ (Q (x)), DQ (W^T)), b).

    The bias stays outside, since its integers would depend on the scale of W, which an update changes. With one more
    dimension, since onnxruntime would make a plain Gemm of it otherwise and leave its integer kernel out.
    """
    x, weight, out = node.inputs[0], node.inputs[1], node.outputs[0]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    name = weight.name
    nodes: list[ir.Node] = []
    scale, x_scale, zero = (_initializer(graph, f"{name}{part}", shape, kind) for part, shape, kind in (
        (SCALE, weight.shape[:1], ir.DataType.FLOAT), (INPUT_SCALE, (), ir.DataType.FLOAT), (INPUT_ZERO, (), ir.DataType.UINT8)))  # fmt: skip
    weight.dtype, weight.shape = ir.DataType.INT8, ir.Shape(weight.shape[::-1])
    axis = graph.initializers.get("int8_axis") or _constant(graph, "int8_axis", np.array([0]))
    x = _new(nodes, "Unsqueeze", [x, axis], f"{name}.input", ir.DataType.FLOAT, ir.Shape([1, *x.shape]))
    q = _new(nodes, "QuantizeLinear", [x, x_scale, zero], f"{name}.input_q", ir.DataType.UINT8, x.shape)
    dq = _new(nodes, "DequantizeLinear", [q, x_scale, zero], f"{name}.input_dq", ir.DataType.FLOAT, x.shape)
    dw = _new(nodes, "DequantizeLinear", [weight, scale], f"{name}.dq", ir.DataType.FLOAT, weight.shape, axis=1)
    total = _new(nodes, "MatMul", [dq, dw], f"{name}.product", ir.DataType.FLOAT, ir.Shape([1, *out.shape]))
    if bias is not None:
        total = _new(nodes, "Add", [total, bias], f"{name}.biased", ir.DataType.FLOAT, total.shape)
    total = _new(nodes, "Squeeze", [total, axis], f"{name}.output", ir.DataType.FLOAT, out.shape)
    graph.insert_before(node, nodes)
    ir.convenience.replace_all_uses_with(out, total)
    graph.remove(node, safe=True)


def _widen_(graph: ir.Graph, value: ir.Value) -> None:
    """A float16 weight becomes float32 where it is used: what is gathered after the gather, the rest when a session opens."""
    value.dtype = ir.DataType.FLOAT16
    for node, index in value.uses():
        fresh: list[ir.Node] = []
        if node.op_type == "Gather" and index == 0:
            out = node.outputs[0]
            out.dtype = ir.DataType.FLOAT16
            users = out.uses()
            wide = _new(fresh, "Cast", [out], f"{value.name}.wide", ir.DataType.FLOAT, out.shape, to=ir.DataType.FLOAT)
            graph.insert_after(node, fresh)
            for user, place in users:
                user.replace_input_with(place, wide)
        else:
            wide = _new(
                fresh, "Cast", [value], f"{value.name}.wide", ir.DataType.FLOAT, value.shape, to=ir.DataType.FLOAT
            )
            graph.insert_before(node, fresh)
            node.replace_input_with(index, wide)


def _initializer(graph: ir.Graph, name: str, shape: Sequence[int], kind: ir.DataType) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape))
    value.const_value = ir.tensor(
        np.zeros(tuple(shape), kind.numpy()), name=name
    )  # replaced by a place in the weights file
    graph.register_initializer(value)
    return value


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.dtype, value.shape = value.const_value.dtype, ir.Shape(array.shape)
    graph.register_initializer(value)
    return value


def _new(
    nodes: list[ir.Node],
    op: str,
    inputs: list[ir.Value],
    name: str,
    kind: ir.DataType,
    shape: ir.Shape | None,
    **attributes: int,
) -> ir.Value:
    node = ir.node(op, inputs, attributes=attributes)
    node.name = node.outputs[0].name = name
    node.outputs[0].dtype, node.outputs[0].shape = kind, shape
    nodes.append(node)
    return node.outputs[0]
