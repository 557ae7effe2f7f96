"""The positive control: the base graph with unmerged low-rank branches, as a runtime adapter would execute it.

    Y = X W^T + bias + (X V^T) U^T      for every linear in the update, U with zeros in rows without experts
    Y = conv(X, W) + bias + U * conv(X, V)      for every convolution, V with W's kernel, stride and padding, U as 1 x 1

Built from the exported graph itself, so the branches are the only difference. A proof that doesn't detect it would not
detect an export that forgot to merge either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from r1export.errors import Unsupported
from r1export.update.factors import ExpertUpdate, Factors, Rows


def add_branches(graph: Path, update: ExpertUpdate, out: Path) -> Path:
    """Write `graph` with the branches of `update` to `out`; the weights are expected in the folder of `out`.

    Parameters of the update that are not in this graph are ignored.

    Raises Unsupported if no parameter of the update is a linear or convolution of this graph.
    """
    model = onnx.load(graph, load_external_data=False)
    groups: dict[str, list[tuple[Rows, Factors]]] = {}
    for rows, pair in update.factors.items():
        groups.setdefault(rows.parameter, []).append((rows, pair))
    nodes: list[NodeProto] = []
    tensors: list[TensorProto] = []
    touched = set()
    dims = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    for node in model.graph.node:
        parameter = next((name for name in node.input[1:2] if name in groups), None)
        if node.op_type not in ("MatMul", "Gemm", "Conv") or parameter is None:
            nodes.append(node)
            continue
        touched.add(parameter)
        nodes += _branched(node, dims[parameter], groups[parameter], tensors)
    if not touched:
        raise Unsupported(
            f"{graph.name} has no layer that the update changes", "the control needs a tower with experts"
        )
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(tensors)
    out.write_bytes(model.SerializeToString(deterministic=True))
    return out


def _branched(
    node: NodeProto, dims: Sequence[int], groups: Sequence[tuple[Rows, Factors]], tensors: list[TensorProto]
) -> list[NodeProto]:
    """The layer, its branches, and the sum under the layer's original name. `dims` are those of its weight."""
    name, found, axis = node.output[0], NodeProto(), 1 if node.op_type == "Conv" else -1
    found.CopyFrom(node)
    found.output[0] = f"{name}.base"
    parts, branches = [], []
    for i, (u, v) in enumerate(_side_by_side(groups, _height(node, dims))):
        branch = f"{name}.branch{i}"
        branches += (
            _convolved(node, branch, u, v, dims, tensors) if axis == 1 else _multiplied(node, branch, u, v, tensors)
        )
        parts.append(branches[-1].output[0])
    side = parts[0]
    if len(parts) > 1:
        side = f"{name}.side"
        branches.append(helper.make_node("Concat", parts, [side], name=side, axis=axis))
    return [found, *branches, helper.make_node("Add", [f"{name}.base", side], [name], name=f"{name}.sum")]


def _multiplied(
    node: NodeProto, branch: str, u: np.ndarray, v: np.ndarray, tensors: list[TensorProto]
) -> list[NodeProto]:
    low, high = f"{branch}.v", f"{branch}.u"
    tensors += [_tensor(f"{low}.weight", v.T), _tensor(f"{high}.weight", u.T)]
    return [
        helper.make_node("MatMul", [node.input[0], f"{low}.weight"], [low], name=low),
        helper.make_node("MatMul", [low, f"{high}.weight"], [high], name=high),
    ]


def _convolved(
    node: NodeProto, branch: str, u: np.ndarray, v: np.ndarray, dims: Sequence[int], tensors: list[TensorProto]
) -> list[NodeProto]:
    low, high = f"{branch}.v", f"{branch}.u"
    tensors += [_tensor(f"{low}.weight", v.reshape(len(v), *dims[1:])), _tensor(f"{high}.weight", u[:, :, None, None])]
    moved = helper.make_node("Conv", [node.input[0], f"{low}.weight"], [low], name=low)
    moved.attribute.extend(node.attribute)
    return [moved, helper.make_node("Conv", [low, f"{high}.weight"], [high], name=high)]


def _tensor(name: str, value: np.ndarray) -> TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(value.astype(np.float32)), name)


def _side_by_side(groups: Sequence[tuple[Rows, Factors]], height: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(u, v) of every branch, u with rows of zeros where no expert is, so that all of them fill the `height` of the weight."""
    ordered = sorted(groups, key=lambda group: group[0])
    starts = [0, *(rows.start for rows, _ in ordered[1:]), height]
    for (rows, pair), start, stop in zip(ordered, starts, starts[1:], strict=False):
        yield np.pad(pair.u, ((rows.start - start, stop - rows.stop), (0, 0))), pair.v


def _height(node: NodeProto, dims: Sequence[int]) -> int:
    """How many outputs a layer has: the weight of a linear is (in, out), of a Gemm with transB or a Conv (out, in, ...)."""
    turned = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return dims[0] if turned or node.op_type == "Conv" else dims[1]
