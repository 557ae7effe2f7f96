"""The positive control: the base graph with its low-rank branches beside the linears, as a runtime adapter would run it.

    Y = X W^T + bias + (X V^T) U^T      beside every linear that the update touches

Built from the exported graph itself, so the branches are the only difference. A proof that cannot tell it from the base
model would not notice an export that forgot to merge.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    for node in model.graph.node:
        parameter = next((name for name in node.input[1:2] if name in groups), None)
        if node.op_type not in ("MatMul", "Gemm") or parameter is None:
            nodes.append(node)
            continue
        touched.add(parameter)
        nodes += _branched(node, parameter, groups[parameter], tensors)
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
    node: NodeProto, parameter: str, groups: Sequence[tuple[Rows, Factors]], tensors: list[TensorProto]
) -> list[NodeProto]:
    """The linear, its branches, and the sum under the linear's old name."""
    name, found = node.output[0], NodeProto()
    found.CopyFrom(node)
    found.output[0] = f"{name}.base"
    parts, branches = [], []
    for i, (rows, pair) in enumerate(sorted(groups, key=lambda group: group[0])):
        low, high = f"{name}.branch{i}.v", f"{name}.branch{i}.u"
        for edge, value in ((low, pair.v), (high, pair.u)):
            tensors.append(numpy_helper.from_array(np.ascontiguousarray(value.T.astype(np.float32)), f"{edge}.weight"))
        branches += [
            helper.make_node("MatMul", [node.input[0], f"{low}.weight"], [low], name=low),
            helper.make_node("MatMul", [low, f"{high}.weight"], [high], name=high),
        ]
        parts.append((rows, high))
    side, joined = _joined(name, parts)
    return [found, *branches, *joined, helper.make_node("Add", [f"{name}.base", side], [name], name=f"{name}.sum")]


def _joined(name: str, parts: Sequence[tuple[Rows, str]]) -> tuple[str, list[NodeProto]]:
    """The branches side by side. Rows between them that have no expert would need padding, which no recipe asks for."""
    starts, stops = [rows.start for rows, _ in parts], [rows.stop for rows, _ in parts]
    if starts != [0, *stops[:-1]]:
        raise Unsupported(
            f"experts beside {', '.join(str(rows) for rows, _ in parts)} only",
            "the control needs experts beside q, k and v",
        )
    if len(parts) == 1:
        return parts[0][1], []
    return f"{name}.side", [
        helper.make_node("Concat", [edge for _, edge in parts], [f"{name}.side"], name=f"{name}.side", axis=-1)
    ]
