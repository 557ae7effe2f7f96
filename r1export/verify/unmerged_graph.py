"""The positive control: the base graph with its low-rank branches beside the linears, as a runtime adapter would run it.

    Y = X W^T + bias + (X V^T) U^T      beside every linear that the update touches, U with zeros in rows without experts

Built from the exported graph itself, so the branches are the only difference. A proof that cannot tell it from the base
model would not notice an export that forgot to merge.
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
    """Write `graph` with the branches of `update` to `out`; its weights are looked for beside `out`.

    Parameters of the update that are not in this graph are passed over.

    Raises Unsupported: no parameter of the update is a linear of this graph.
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
        if node.op_type not in ("MatMul", "Gemm") or parameter is None:
            nodes.append(node)
            continue
        touched.add(parameter)
        nodes += _branched(node, parameter, _height(node, dims[parameter]), groups[parameter], tensors)
    if not touched:
        raise Unsupported(
            f"{graph.name} has no linear that the update changes", "the control needs a tower with experts"
        )
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(tensors)
    out.write_bytes(model.SerializeToString(deterministic=True))
    return out


def _branched(
    node: NodeProto, parameter: str, height: int, groups: Sequence[tuple[Rows, Factors]], tensors: list[TensorProto]
) -> list[NodeProto]:
    """The linear, its branches, and the sum under the linear's old name. `height` is the number of its outputs."""
    name, found = node.output[0], NodeProto()
    found.CopyFrom(node)
    found.output[0] = f"{name}.base"
    parts, branches = [], []
    for i, (u, v) in enumerate(_side_by_side(groups, height)):
        low, high = f"{name}.branch{i}.v", f"{name}.branch{i}.u"
        for edge, value in ((low, v), (high, u)):
            tensors.append(numpy_helper.from_array(np.ascontiguousarray(value.T.astype(np.float32)), f"{edge}.weight"))
        branches += [
            helper.make_node("MatMul", [node.input[0], f"{low}.weight"], [low], name=low),
            helper.make_node("MatMul", [low, f"{high}.weight"], [high], name=high),
        ]
        parts.append(high)
    side = parts[0]
    if len(parts) > 1:
        side = f"{name}.side"
        branches.append(helper.make_node("Concat", parts, [side], name=side, axis=-1))
    return [found, *branches, helper.make_node("Add", [f"{name}.base", side], [name], name=f"{name}.sum")]


def _side_by_side(groups: Sequence[tuple[Rows, Factors]], height: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(u, v) of every branch, u with rows of zeros where no expert is, so that all of them fill the `height` of the weight."""
    ordered = sorted(groups, key=lambda group: group[0])
    starts = [0, *(rows.start for rows, _ in ordered[1:]), height]
    for (rows, pair), start, stop in zip(ordered, starts, starts[1:], strict=False):
        yield np.pad(pair.u, ((rows.start - start, stop - rows.stop), (0, 0))), pair.v


def _height(node: NodeProto, dims: Sequence[int]) -> int:
    """How many outputs a linear has: its weight is (in, out), of a Gemm with transB (out, in)."""
    turned = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return dims[0] if turned else dims[1]
