"""Write parts of a graph in operators that the compilers of phones and accelerators take.

    Gather(x, scalar i)      ->  Squeeze(Slice(x, i, i + 1))     CoreML gathers along whole indices only
    ReduceL2(x)              ->  Sqrt(ReduceSum(Mul(x, x)))      CoreML has none
    Div(x, Expand(y))        ->  Div(x, y)                       where y broadcasts by itself: CoreML has no Expand to a computed shape
    ArgMax(x in int64)       ->  ArgMax(Cast(x, int32))          LiteRT has it for int32 only

Each computes the same: a sum of squares may round otherwise in the last bit. What it costs is in docs/experiments/export.md.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

Rewrite = Callable[[ir.Node], list[ir.Node] | None]  # what computes the node's output instead, or None to leave it
LAST = np.iinfo(np.int64).max  # as the end of a slice: to the end


def portable_(graph: ir.Graph) -> None:
    """Rewrite `graph` in place; nodes that nobody needs any more stay, for the caller to remove."""
    for node in list(graph):
        rewrite = REWRITES.get(node.op_type)
        if rewrite and (replacement := rewrite(node)):
            ir.convenience.replace_nodes_and_values(
                graph, node, [node], replacement, list(node.outputs), list(replacement[-1].outputs)
            )


def _gather(node: ir.Node) -> list[ir.Node] | None:
    data, indices = node.inputs
    index = ir.convenience.get_const_tensor(indices)
    if index is None or index.shape.numpy() or data.is_initializer():
        return None
    position = int(index.numpy())
    axis = node.attributes.get_int("axis", 0)
    end = position + 1 if position != -1 else LAST
    ends = [_constant(node, name, [value]) for name, value in (("start", position), ("end", end), ("axis", axis))]
    slices = _node(node, "Slice", [data, *ends])
    return [*(value.producer() for value in ends), slices, _node(node, "Squeeze", [slices.outputs[0], ends[2]])]


def _reduce_l2(node: ir.Node) -> list[ir.Node]:
    square = _node(node, "Mul", [node.inputs[0], node.inputs[0]])
    total = _node(node, "ReduceSum", [square.outputs[0], *node.inputs[1:]])
    total.attributes.update(node.attributes)
    return [square, total, _node(node, "Sqrt", [total.outputs[0]])]


def _div(node: ir.Node) -> list[ir.Node] | None:
    value, divisor = node.inputs
    expand = divisor.producer()
    if expand is None or expand.op_type != "Expand" or divisor.shape != value.shape:
        return None
    narrow = expand.inputs[0]
    if narrow.shape is None or len(narrow.shape) != len(value.shape):
        return None
    return [_node(node, "Div", [value, narrow])]


def _arg_max(node: ir.Node) -> list[ir.Node] | None:
    if node.inputs[0].dtype != ir.DataType.INT64:
        return None
    cast = _node(node, "Cast", [node.inputs[0]], to=ir.DataType.INT32)
    found = _node(node, "ArgMax", [cast.outputs[0]])
    found.attributes.update(node.attributes)
    return [cast, found]


REWRITES: dict[str, Rewrite] = {"Gather": _gather, "ReduceL2": _reduce_l2, "Div": _div, "ArgMax": _arg_max}


def _node(replaced: ir.Node, op: str, inputs: list[ir.Value], **attributes: int) -> ir.Node:
    """A node whose name says what it stands for."""
    node = ir.node(op, inputs, attributes)
    node.name = node.outputs[0].name = f"{replaced.outputs[0].name}_{op.lower()}"
    return node


def _constant(replaced: ir.Node, name: str, value: list[int]) -> ir.Value:
    tensor = ir.tensor(np.array(value, np.int64))
    node = ir.node("Constant", [], {"value": ir.AttrTensor("value", tensor)})
    node.name = node.outputs[0].name = f"{replaced.outputs[0].name}_{name}"
    node.outputs[0].const_value = tensor
    return node.outputs[0]
