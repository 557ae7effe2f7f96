"""Re-export a merged model and compare it with its release.

A release is written without the exporter, from the exported graphs of the base and the merged weights. The audit is
independent of that: it traces every block of the merged model, walks both graphs in parallel, and compares every byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from r1export.errors import CheckFailed
from r1export.export.sentinels import blank_copy
from r1export.export.towers import float_tensors, make_towers
from r1export.export.trace import trace
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
    for tower in make_towers(_like_exported(model), image_size, context_length):
        fresh, deployed = trace(tower, opset, repeat=False)[0].graph, ir.load(release / tower.files.graph).graph
        stored = map_tensors(release / tower.files.weights)
        location = f"{release.name}/{tower.files.graph}"
        pairs = _walk(fresh, deployed, location)
        for fresh_value, released in pairs:
            expected = stored[released.name] if released.name in stored else released.const_value.numpy()
            _same_bytes(fresh_value.const_value.numpy(), expected, f"{location}: {released.name}")
            parameters += released.name in stored
            nbytes += expected.nbytes if released.name in stored else 0
        nodes += len(fresh)
    return Audit(nodes, parameters, nbytes)


@torch.no_grad()
def _like_exported(model: nn.Module) -> nn.Module:
    """A copy with contiguous tensors, as `export_graphs` traces: torch decomposes some operators by the strides of a weight."""
    copied, tensors = blank_copy(model), float_tensors(model)
    for name, tensor in float_tensors(copied).items():
        tensor.copy_(tensors[name])
    return copied


def _walk(fresh: ir.Graph, deployed: ir.Graph, location: str) -> list[tuple[ir.Value, ir.Value]]:
    """The initializers that stand in the same places of both graphs, once each."""
    _same(
        [(v.dtype, v.shape) for v in fresh.inputs], [(v.dtype, v.shape) for v in deployed.inputs], f"{location}: inputs"
    )
    _same(len(fresh), len(deployed), f"{location}: number of nodes")
    twin: dict[ir.Value | None, ir.Value | None] = {None: None, **dict(zip(fresh.inputs, deployed.inputs, strict=True))}
    pairs: list[tuple[ir.Value, ir.Value]] = []
    for i, (node, released) in enumerate(zip(fresh, deployed, strict=True)):
        where = f"{location}: node {i} ({released.op_type})"
        _same(
            (node.domain, node.op_type, len(node.inputs)),
            (released.domain, released.op_type, len(released.inputs)),
            where,
        )
        _same(_attributes(node), _attributes(released), where)
        for mine, theirs in zip(node.inputs, released.inputs, strict=True):
            if mine and theirs and mine not in twin and mine.is_initializer() and theirs.is_initializer():
                twin[mine] = theirs
                pairs.append((mine, theirs))
            if twin.get(mine, mine) is not theirs:
                read, expected = (value.name if value else "nothing" for value in (theirs, mine))
                raise CheckFailed(
                    f"{where}: reads {read}, the new export reads {expected}",
                    "export the run again with --overwrite",
                )
        twin.update(zip(node.outputs, released.outputs, strict=True))
    _same([twin[v] for v in fresh.outputs], list(deployed.outputs), f"{location}: outputs")
    return pairs


def _attributes(node: ir.Node) -> dict[str, str]:
    """A file holds floats in 32 bits, a fresh graph in 64."""
    return {
        name: str(np.float32(a.value) if a.type == ir.AttributeType.FLOAT else a.value)
        for name, a in node.attributes.items()
    }


def _same(fresh: object, released: object, where: str) -> None:
    if fresh != released:
        raise CheckFailed(
            f"{where}: {released} in the release, {fresh} in the new export", "export the run again with --overwrite"
        )


def _same_bytes(fresh: np.ndarray, released: np.ndarray, where: str) -> None:
    arrays = [np.ascontiguousarray(array) for array in (fresh, released)]
    contents = [(array.dtype, array.shape, array.tobytes()) for array in arrays]
    if contents[0] != contents[1]:
        new, old = (f"sha256 {sha256_bytes(data)[:16]} {list(shape)}" for _, shape, data in contents)
        raise CheckFailed(
            f"{where}: {old} in the release, {new} in a fresh export",
            "the release has other weights than the merged model: export it again",
        )
