"""The int8 variant: linears and convolutions multiply 8-bit integers, with static scales, one per row of a weight.

    x ~ input_scale * (q - input_zero_point), q uint8        W ~ scale[:, None] * q, q int8 (update/int8.py)

Protected, because they are small or read rather than multiplied: biases, norms and positions in float32; patch and token
embeddings, the convolution that sees pixels and the last projection in float16. Attention itself stays in float32. The
ranges of inputs, and of the outputs of convolutions, come from a calibration of the base model and are part of its weights
file, so they stay when weights are merged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from r1export.export.graph import write_graph
from r1export.export.session import open_session
from r1export.export.weight_map import Placement, WeightMap, place_
from r1export.update.release_layout import GRAPHS, TOWERS, WEIGHTS
from r1export.update.run_layout import WEIGHT_MAP

SCALE = ".scale"
INPUT, OUTPUT = ".input", ".output"  # the values of a layer that are quantised
STEP, ZERO = "_scale", "_zero_point"  # of such a value
SMALL = 1 << 12  # elements: a smaller linear costs more in extra nodes than it saves in bytes
LARGEST_BIAS = 2**30  # as an integer: the other half of 32 bits is for the sum that it is added to
BATCH = 8  # inputs run at a time while calibrating
Ranges = Mapping[str, tuple[float, float]]


def calibrate(release: Path, inputs: Mapping[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """Smallest and largest value that each range of `range_of` has to hold, by its name.

    `release` is a float32 folder of graphs with the base's weights; `inputs` are pixel_values (n, 3, H, W) and input_ids
    (n, L) of the tasks at hand.
    """
    ranges: dict[str, tuple[float, float]] = {}
    for tower in TOWERS:
        model = ir.load(release / tower.graph)
        watched = {str(node.inputs[1].name): node.inputs[0] for node in _linears(model.graph)}
        for found in _convolutions(model.graph):
            watched |= {range_of(found.name + INPUT): found.node.inputs[0]} if found.reads == found.name + INPUT else {}
            watched |= {range_of(found.name + OUTPUT): found.output}
        distinct = list(dict.fromkeys(watched.values()))
        if not distinct:
            continue
        session = _session_with_outputs(model, distinct, release)
        seen: dict[str, list[Any]] = {value.name: [] for value in distinct}
        for start in range(0, len(inputs[tower.input]), BATCH):
            feeds = {tower.input: inputs[tower.input][start : start + BATCH]}
            for name, output in zip(seen, session.run(list(seen), feeds), strict=True):
                seen[name].append((output.min(), output.max()))
        for name, value in watched.items():
            low, high = np.array(seen[value.name], np.float64).T
            ranges[name] = float(low.min()), float(high.max())
    return ranges


def range_of(value: str) -> str:
    """The name of the range of a quantised value: inputs are named after the weight that they are multiplied by."""
    return value.removesuffix(INPUT)


def _session_with_outputs(model: ir.Model, values: list[ir.Value], folder: Path) -> ort.InferenceSession:
    model = model.clone()
    by_name = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(
        by_name[value.name] for value in values if by_name[value.name] not in model.graph.outputs
    )
    return open_session(ir.to_proto(model).SerializeToString(), folder)


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


@dataclass(frozen=True, eq=False)
class _Convolution:
    """A convolution to quantise: its node, the name of its weight, its output after a ReLU, and the value that it reads.

    `reads` names the quantised value: the output of another such convolution, or an input, which the first reader names.
    """

    node: ir.Node
    name: str
    output: ir.Value
    reads: str


def _convolutions(graph: ir.Graph) -> list[_Convolution]:
    """All but the one that sees pixels: it is in float16, as patch embeddings are."""
    quantised: dict[ir.Value, str] = {}
    found = []
    for node in graph:
        if node.op_type != "Conv" or not _is_weight(node.inputs[1]) or _is_image(node.inputs[0], graph):
            continue
        name, output = str(node.inputs[1].name), node.outputs[0]
        reads = quantised.setdefault(node.inputs[0], name + INPUT)
        readers = output.consumers()
        if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip") and readers[0].inputs[0] is output:
            output = readers[0].outputs[0]
        quantised[output] = name + OUTPUT
        found.append(_Convolution(node, name, output, reads))
    return found


def _is_image(value: ir.Value, graph: ir.Graph) -> bool:
    producer = value.producer()
    return value in graph.inputs or (
        producer is not None and producer.op_type == "Pad" and producer.inputs[0] in graph.inputs
    )


def _is_weight(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and isinstance(value.const_value, ir.ExternalTensor)


def _placements(placement: Placement, graph: ir.Graph) -> list[Placement]:
    name, shape = placement.parameter, placement.shape
    if any(node.inputs[1].name == name for node in _linears(graph)):
        weight = Placement(name, shape[::-1], transposed=True, dtype="I8")
        return [weight, Placement(name + SCALE, shape[:1]), *_scale_of(name + INPUT)]
    for found in _convolutions(graph):
        if found.name == name:
            own = [name + OUTPUT] if found.reads != name + INPUT else [name + INPUT, name + OUTPUT]
            scales = [placed for value in own for placed in _scale_of(value)]
            return [Placement(name, shape, dtype="I8"), Placement(name + SCALE, shape[:1]), *scales]
    embedding = name in graph.initializers and any(
        node.op_type in ("Conv", "Gather", "MatMul", "Gemm") for node in graph.initializers[name].consumers()
    )
    return (
        [Placement(name, shape, placement.transposed, "F16")]
        if embedding and len(shape) > 1 and np.prod(shape) >= SMALL
        else [placement]
    )


def _scale_of(value: str) -> list[Placement]:
    """Where the step and the zero of a quantised value lie: scalars."""
    return [Placement(value + STEP, ()), Placement(value + ZERO, (), dtype="U8")]


def _quantize_(graph: ir.Graph, placements: Mapping[str, Placement]) -> None:
    for node in _linears(graph):
        _quantize_linear_(graph, node)
    _quantize_convolutions_(graph)
    for name, value in list(graph.initializers.items()):
        placement = placements.get(name)
        if placement is not None and placement.dtype == "F16":
            _widen_(graph, value)


def _quantize_convolutions_(graph: ir.Graph) -> None:
    """Conv (x, W, b) -> Conv (DQ (Q (x)), DQ (W), DQ (integers of b)) with Q and DQ behind it, which onnxruntime runs as QLinearConv.

    A value is quantised once, whoever reads it: what one convolution writes is what the next one reads.
    """
    steps: dict[str, ir.Value] = {}
    for found in _convolutions(graph):
        if found.reads not in steps:
            x = found.node.inputs[0]
            steps[found.reads] = _quantize_value_(graph, x, found.reads, only="Conv")
        _quantize_weight_(graph, found.node, steps[found.reads])
        steps[found.name + OUTPUT] = _quantize_value_(graph, found.output, found.name + OUTPUT)


def _quantize_value_(graph: ir.Graph, x: ir.Value, name: str, *, only: str = "") -> ir.Value:
    """Give all readers of `x`, or those of one op, its quantised form in float32 again; returns the step."""
    readers = [(node, index) for node, index in x.uses() if only in ("", node.op_type)]
    nodes: list[ir.Node] = []
    step = _initializer(graph, name + STEP, (), ir.DataType.FLOAT)
    zero = _initializer(graph, name + ZERO, (), ir.DataType.UINT8)
    q = _new(nodes, "QuantizeLinear", [x, step, zero], f"{name}_q", ir.DataType.UINT8, x.shape)
    dq = _new(nodes, "DequantizeLinear", [q, step, zero], f"{name}_dq", ir.DataType.FLOAT, x.shape)
    graph.insert_after(x.producer(), nodes)
    for node, index in readers:
        node.replace_input_with(index, dq)
    return step


def _quantize_weight_(graph: ir.Graph, node: ir.Node, step: ir.Value) -> None:
    """Weight and bias as integers. Those of the bias follow from the scales, which an update changes, so the graph computes
    them from constants when a session opens.

    The bias counts in steps of scale * step. Where it is too large for those, in a channel whose weights are next to nothing,
    a wider scale stands for that of the weights.
    """
    weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    name, rows, single = str(weight.name), weight.shape[:1], ir.DataType.FLOAT
    nodes: list[ir.Node] = []
    scale = _initializer(graph, name + SCALE, rows, single)
    weight.dtype = ir.DataType.INT8
    if bias is not None:
        most = graph.initializers.get("int8_bias") or _constant(graph, "int8_bias", np.float32(LARGEST_BIAS))
        size = _new(nodes, "Abs", [bias], f"{name}.bias_size", single, ir.Shape(rows))
        needed = _new(nodes, "Div", [size, _new(nodes, "Mul", [step, most], f"{name}.bias_most", single, ir.Shape(()))],
            f"{name}.bias_scale", single, ir.Shape(rows))  # fmt: skip
        scale = _new(nodes, "Max", [scale, needed], f"{name}.wide_scale", single, ir.Shape(rows))
        unit = _new(nodes, "Mul", [scale, step], f"{name}.bias_unit", single, ir.Shape(rows))
        counted = _new(nodes, "Round", [_new(nodes, "Div", [bias, unit], f"{name}.bias_units", single, ir.Shape(rows))],
            f"{name}.bias_counted", single, ir.Shape(rows))  # fmt: skip
        whole = _new(
            nodes, "Cast", [counted], f"{name}.bias_q", ir.DataType.INT32, ir.Shape(rows), to=ir.DataType.INT32
        )
        node.replace_input_with(
            2, _new(nodes, "DequantizeLinear", [whole, unit], f"{name}.bias_dq", single, ir.Shape(rows), axis=0)
        )
    dw = _new(nodes, "DequantizeLinear", [weight, scale], f"{name}.dq", single, weight.shape, axis=0)
    node.replace_input_with(1, dw)
    graph.insert_before(node, nodes)


def _quantize_linear_(graph: ir.Graph, node: ir.Node) -> None:
    """Gemm (x, W, b) -> Add (MatMul (DQ (Q (x)), DQ (W^T)), b).

    The bias stays outside, since its integers would depend on the scale of W, which an update changes. With one more
    dimension, since onnxruntime would make a plain Gemm of it otherwise and leave its integer kernel out.
    """
    x, weight, out = node.inputs[0], node.inputs[1], node.outputs[0]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    name = weight.name
    nodes: list[ir.Node] = []
    scale, x_scale, zero = (_initializer(graph, f"{name}{suffix}", shape, kind) for suffix, shape, kind in (
        (SCALE, weight.shape[:1], ir.DataType.FLOAT), (INPUT + STEP, (), ir.DataType.FLOAT), (INPUT + ZERO, (), ir.DataType.UINT8)))  # fmt: skip
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
            for user, input_index in users:
                user.replace_input_with(input_index, wide)
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
