"""The digest of an ONNX graph's structure, independent of names and weights.

It covers nodes with their attributes, edges numbered in order of appearance, opsets, inputs, outputs, and tensors: a
weight (external data) by dtype and shape, a constant (inline) also by value.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, numpy_helper

from r1export.errors import CheckFailed, first_line
from r1export.update.release_layout import GRAPHS, STATIC_GRAPHS

SMALL = 1024  # bytes; integers up to this size are shapes, axes and indices and belong to the structure
FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
QUANTIZED = {TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32}  # weights, zeros and biases of integer kernels


def graph_digest(graph: Path | onnx.ModelProto, *, structural: bool = False) -> str:
    """SHA-256 of the structure of `graph`.

    `structural` ignores the values of inline floats, and of integers that a quantized kernel computes with: onnxruntime's
    optimizer folds and inlines weights, and two models with different weights still have the same structure. Laws: renaming
    values, nodes or dimensions, or changing the bytes of weights, doesn't change the digest; another node, attribute, edge,
    dtype, shape, opset, or constant does.

    Raises CheckFailed if the file is missing or not a valid ONNX graph.
    """
    model = graph if isinstance(graph, onnx.ModelProto) else read_graph(graph)
    try:
        document = json.dumps(_Digest(structural).model(model), sort_keys=True)
    except Exception as error:  # an untrusted graph can violate the format in any way
        raise CheckFailed(f"not a valid ONNX graph: {first_line(error)}", "export the graphs again") from error
    return hashlib.sha256(document.encode()).hexdigest()


def graph_digests(folder: Path) -> dict[str, str]:
    """Graph -> digest, of those that every release has, and of static ones if they are there. Raises as `graph_digest`."""
    present = (*GRAPHS, *(name for name in STATIC_GRAPHS if (folder / name).exists()))
    return {name: graph_digest(folder / name) for name in present}


def read_graph(path: Path) -> onnx.ModelProto:
    """The graph without its weights. Raises CheckFailed if the file is missing or not an ONNX graph."""
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError is not part of its public interface
        raise CheckFailed(f"{path} is not an ONNX graph: {str(error)[:120]}", "export the graphs again") from error
    if not model.graph.output:  # an empty file is a valid message
        raise CheckFailed(f"{path} is not an ONNX graph: it has no output", "export the graphs again")
    return model


class _Scope:
    """The values in the scope of one graph. Values are numbered at first use, so the order of initializers doesn't matter."""

    def __init__(self, tensors: Mapping[str, Any], outer: _Scope | None = None) -> None:
        self.tensors, self.outer = tensors, outer
        self.depth: int = outer.depth + 1 if outer else 0
        self.numbers: dict[str, Any] = {}
        self.unused = set(tensors)

    def new(self, name: str) -> str | None:
        """Number a value that is defined here; None for an omitted output."""
        if name:
            self.numbers[name] = f"{self.depth}.{len(self.numbers)}"
        return self.numbers.get(name)

    def find(self, name: str) -> Any:
        """The number of a value, with its description at the first use of an initializer."""
        if not name:
            return None
        if name in self.unused:
            self.unused.discard(name)
            return [self.new(name), self.tensors[name]]
        if name in self.numbers:
            return self.numbers[name]
        return self.outer.find(name) if self.outer else "undefined"


class _Digest:
    """Walks one model."""

    def __init__(self, structural: bool) -> None:
        self.structural = structural
        self.dimensions: dict[str, str] = {}

    def model(self, model: onnx.ModelProto) -> list[Any]:
        opsets = sorted((o.domain, o.version) for o in model.opset_import)
        return [opsets, self._graph(model.graph, None), [self._function(f) for f in model.functions]]

    def _graph(self, graph: onnx.GraphProto, outer: _Scope | None) -> list[Any]:
        tensors = {t.name: self._tensor(t) for t in graph.initializer} | {
            t.values.name: self._tensor(t) for t in graph.sparse_initializer
        }
        scope = _Scope(tensors, outer)
        inputs = [[self._value(v), "overrides" if v.name in tensors else scope.new(v.name)] for v in graph.input]
        nodes = [self._node(node, scope) for node in graph.node]
        outputs = [[scope.find(v.name), self._value(v)] for v in graph.output]
        return [inputs, nodes, outputs, sorted(json.dumps(tensors[name]) for name in scope.unused)]

    def _node(self, node: onnx.NodeProto, scope: _Scope) -> list[Any]:
        operands = [scope.find(name) for name in node.input]
        attributes = sorted(([a.name, self._attribute(a, scope)] for a in node.attribute), key=lambda pair: pair[0])
        return [
            node.domain,
            node.op_type,
            node.overload,
            operands,
            [scope.new(name) for name in node.output],
            attributes,
        ]

    def _attribute(self, attribute: AttributeProto, scope: _Scope) -> Any:
        if attribute.ref_attr_name:
            return ["reference", attribute.ref_attr_name]
        value = onnx.helper.get_attribute_value(attribute)
        if attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
            return [
                self._graph(graph, scope) for graph in ([value] if attribute.type == AttributeProto.GRAPH else value)
            ]
        if attribute.type in (AttributeProto.TENSOR, AttributeProto.TENSORS):
            return [self._tensor(tensor) for tensor in ([value] if attribute.type == AttributeProto.TENSOR else value)]
        return [attribute.type, repr(value if isinstance(value, int | float | bytes) else list(value))]

    def _function(self, function: onnx.FunctionProto) -> list[Any]:
        scope = _Scope({})
        for name in function.input:
            scope.new(name)
        opsets = sorted((o.domain, o.version) for o in function.opset_import)
        defaults = [[a.name, self._attribute(a, scope)] for a in function.attribute_proto]
        nodes = [self._node(node, scope) for node in function.node]
        return [
            function.domain,
            function.name,
            function.overload,
            opsets,
            sorted(function.attribute),
            defaults,
            nodes,
            [scope.find(name) for name in function.output],
        ]

    def _tensor(self, tensor: TensorProto | onnx.SparseTensorProto) -> list[Any]:
        if isinstance(tensor, onnx.SparseTensorProto):
            return ["sparse", list(tensor.dims), self._tensor(tensor.values), self._tensor(tensor.indices)]
        known = [tensor.data_type, list(tensor.dims)]
        if tensor.data_location == TensorProto.EXTERNAL or (self.structural and tensor.data_type in FLOATS | QUANTIZED):
            return [*known, None]
        if tensor.data_type == TensorProto.STRING:
            return [*known, [text.hex() for text in tensor.string_data]]
        data = np.ascontiguousarray(numpy_helper.to_array(tensor)).tobytes()
        if self.structural and len(data) > SMALL:
            return [*known, None]  # quantised weights
        return [*known, data.hex() if len(data) <= SMALL else hashlib.sha256(data).hexdigest()]

    def _value(self, value: onnx.ValueInfoProto) -> Any:
        """Element type and shape; dynamic dimensions are numbered in the order in which they appear."""
        if not value.type.HasField("tensor_type"):
            return value.type.SerializeToString(deterministic=True).hex()
        tensor = value.type.tensor_type
        return [
            tensor.elem_type,
            [d.dim_value if d.HasField("dim_value") else self._dimension(d.dim_param) for d in tensor.shape.dim],
        ]

    def _dimension(self, name: str) -> str:
        return self.dimensions.setdefault(name, f"dynamic {len(self.dimensions)}") if name else "unknown"
