"""Export a merged model afresh and hold it against its release: the long way has to lead to the same files.

A release is written without the exporter, from the graphs of the one export and the merged weights. The audit takes no
part of that: it traces the model with the weights it has, walks both graphs side by side, and compares every byte.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from torch import nn

from r1export.errors import CheckFailed
from r1export.export.graph import trace
from r1export.export.towers import make_towers
from r1export.update.atomic_io import sha256_bytes
from r1export.update.container import map_tensors


@dataclass(frozen=True)
class Audit:
    """What was compared: nodes of both towers, parameters, and bytes of weights."""

    nodes: int
    parameters: int
    nbytes: int


def audit_reexport(
    model: nn.Module, image_size: tuple[int, int], context_length: int, release: Path, *, opset: int
) -> Audit:
    """Export `model`, which has the merged weights, and compare program and weights with the folder `release`.

    Raises:
        CheckFailed: a node, an edge, an attribute, a constant or a weight differs; the message names the first.
        Unsupported: the exporter cannot trace the model.
    """
    nodes = parameters = nbytes = 0
    for tower in make_towers(copy.deepcopy(model).cpu().float().eval(), image_size, context_length):
        fresh, fielded = trace(tower, opset)[0].graph, ir.load(release / tower.files.graph).graph
        stored = map_tensors(release / tower.files.weights)
        place = f"{release.name}/{tower.files.graph}"
        pairs = _walk(fresh, fielded, place)
        for one, other in pairs:
            expected = stored[other.name] if other.name in stored else other.const_value.numpy()
            _same_bytes(one.const_value.numpy(), expected, f"{place}: {other.name}")
            parameters += other.name in stored
            nbytes += expected.nbytes if other.name in stored else 0
        nodes += len(fresh)
    return Audit(nodes, parameters, nbytes)


def _walk(fresh: ir.Graph, fielded: ir.Graph, place: str) -> list[tuple[ir.Value, ir.Value]]:
    """The initializers that stand in the same places of both graphs, once each."""
    _same([(v.dtype, v.shape) for v in fresh.inputs], [(v.dtype, v.shape) for v in fielded.inputs], f"{place}: inputs")
    _same(len(fresh), len(fielded), f"{place}: number of nodes")
    twin: dict[ir.Value | None, ir.Value | None] = {None: None, **dict(zip(fresh.inputs, fielded.inputs, strict=True))}
    pairs: list[tuple[ir.Value, ir.Value]] = []
    for i, (one, other) in enumerate(zip(fresh, fielded, strict=True)):
        where = f"{place}: node {i} ({other.op_type})"
        _same((one.domain, one.op_type, len(one.inputs)), (other.domain, other.op_type, len(other.inputs)), where)
        _same(_attributes(one), _attributes(other), where)
        for mine, theirs in zip(one.inputs, other.inputs, strict=True):
            if mine and theirs and mine not in twin and mine.is_initializer() and theirs.is_initializer():
                twin[mine] = theirs
                pairs.append((mine, theirs))
            if twin.get(mine, mine) is not theirs:
                read, expected = (value.name if value else "nothing" for value in (theirs, mine))
                raise CheckFailed(
                    f"{where}: reads {read}, the fresh export reads {expected}",
                    "export the run again with --overwrite",
                )
        twin.update(zip(one.outputs, other.outputs, strict=True))
    _same([twin[v] for v in fresh.outputs], list(fielded.outputs), f"{place}: outputs")
    return pairs


def _attributes(node: ir.Node) -> dict[str, str]:
    """A file holds floats in 32 bits, a fresh graph in 64."""
    return {
        name: str(np.float32(a.value) if a.type == ir.AttributeType.FLOAT else a.value)
        for name, a in node.attributes.items()
    }


def _same(found: object, expected: object, where: str) -> None:
    if found != expected:
        raise CheckFailed(
            f"{where}: {expected} in the release, {found} in a fresh export", "export the run again with --overwrite"
        )


def _same_bytes(found: np.ndarray, expected: np.ndarray, where: str) -> None:
    one, other = np.ascontiguousarray(found), np.ascontiguousarray(expected)
    if one.dtype != other.dtype or one.shape != other.shape or one.tobytes() != other.tobytes():
        theirs, mine = (f"sha256 {sha256_bytes(array.tobytes())[:16]} {list(array.shape)}" for array in (other, one))
        raise CheckFailed(
            f"{where}: {theirs} in the release, {mine} in a fresh export",
            "the merged weights are not those of the release: write it again",
        )
