"""Zero added latency as a ladder of evidence, from "the same file" up to "the same time".

L0 same file: base and release use byte-identical .onnx files. L1 graph: the program in them has the same digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from r1export.update.files import sha256_file

INLINE_BYTES = 1024  # constants up to this size are part of the program (shapes, axes, scalars) and enter by value


def same_files(base: Mapping[str, Path], release: Mapping[str, Path]) -> dict[str, Any]:
    """Rung L0. Raises nothing: a missing file is a failed rung."""
    differing = [name for name, path in base.items() if not release[name].exists() or sha256_file(path) != sha256_file(release[name])]
    return _rung(not differing, _fold(base.values()), _fold(release.values()), f"differs: {', '.join(differing)}" if differing else f"{', '.join(base)} are byte-identical")


def same_graphs(base: Mapping[str, Path], release: Mapping[str, Path]) -> dict[str, Any]:
    """Rung L1."""
    digests = {name: (graph_digest(path), graph_digest(release[name])) for name, path in base.items()}
    differing = [name for name, (one, other) in digests.items() if one != other]
    expected, found = (hashlib.sha256("".join(d[i] for d in digests.values()).encode()).hexdigest() for i in (0, 1))
    return _rung(not differing, expected, found, f"differs: {', '.join(differing)}" if differing else "same nodes, attributes, edges, opsets, inputs and outputs")


def _rung(holds: bool, expected: str, digest: str, detail: str) -> dict[str, Any]:
    return {"verdict": "pass" if holds else "fail", "digest": digest, "expected": expected, "detail": detail}


def not_measured(detail: str) -> dict[str, Any]:
    """A rung nobody climbed: neither passed nor failed."""
    return {"verdict": "not measured", "digest": None, "expected": None, "detail": detail}


def _fold(paths: Iterable[Path]) -> str:
    return hashlib.sha256("".join(sha256_file(path) if path.exists() else "-" for path in paths).encode()).hexdigest()


def graph_digest(path: Path) -> str:
    """SHA-256 over what a graph computes.

    Nodes with attributes and renumbered edges, opsets, inputs, outputs, dtypes and shapes of initializers, and small
    constants by value. Names, documentation and the bytes of external weights are left out.
    """
    model = onnx.load(path, load_external_data=False)
    value = [sorted((o.domain, o.version) for o in model.opset_import), _graph(model.graph, {}), [_function(f) for f in model.functions]]
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _graph(graph: onnx.GraphProto, outer: Mapping[str, Any]) -> list[Any]:
    """Edges are numbered in the order in which they appear; initializers are known by what they hold."""
    numbers: dict[str, Any] = dict(outer)
    initializers = {i.name for i in graph.initializer}
    inputs = [i for i in graph.input if i.name not in initializers]
    for value in inputs:
        numbers[value.name] = f"in{len(numbers)}"
    for tensor in graph.initializer:
        numbers[tensor.name] = ["init", len(numbers), *_tensor(tensor)]
    nodes = []
    for node in graph.node:
        operands = [numbers[name] if name else None for name in node.input]
        for name in node.output:
            numbers[name] = len(numbers)
        attributes = sorted(((a.name, _attribute(a, numbers)) for a in node.attribute), key=lambda pair: pair[0])
        nodes.append([node.domain, node.op_type, operands, [numbers[n] if n else None for n in node.output], attributes])
    return [[_value(v) for v in inputs], nodes, [[numbers[v.name], _value(v)] for v in graph.output]]


def _attribute(attribute: onnx.AttributeProto, outer: Mapping[str, Any]) -> Any:
    if attribute.type == onnx.AttributeProto.GRAPH:
        return _graph(attribute.g, outer)
    if attribute.type == onnx.AttributeProto.TENSOR:
        return _tensor(attribute.t)
    value = onnx.helper.get_attribute_value(attribute)
    return repr(list(value) if not isinstance(value, int | float | bytes) else value)


def _function(function: onnx.FunctionProto) -> list[Any]:
    return [function.domain, function.name, function.SerializeToString(deterministic=True).hex()]


def _tensor(tensor: onnx.TensorProto) -> list[Any]:
    external = tensor.data_location == onnx.TensorProto.EXTERNAL
    array = None if external else np.ascontiguousarray(numpy_helper.to_array(tensor))
    small = array is not None and array.nbytes <= INLINE_BYTES
    return [tensor.data_type, list(tensor.dims), array.tobytes().hex() if small else None]


def _value(value: onnx.ValueInfoProto) -> list[Any]:
    """Element type and shape; a dynamic dimension is known by its name."""
    tensor = value.type.tensor_type
    return [tensor.elem_type, [d.dim_value if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim]]
