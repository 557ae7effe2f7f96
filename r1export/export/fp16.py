"""The fp16 variant: half the bytes, computed in float16 up to the embedding and in float32 from there on.

Its weights are an ordinary base in float16, so updates merge into it by the one merge: W' = float16(float32(W + sum_e u_e v_e^T)).
Normalisation and logits stay in float32, where 1e-12 and 100 * cosine have room.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from r1export.export.graph import write_graph
from r1export.export.weight_map import WeightMap, place_
from r1export.update.release_layout import GRAPHS, TOWERS, WEIGHTS
from r1export.update.run_layout import WEIGHT_MAP

HALF = ir.DataType.FLOAT16
UNIT_NORM = {tower.output for tower in TOWERS}


def half_graphs(graphs: Path, folder: Path) -> WeightMap:
    """Write the float16 form of all graphs of `graphs` into `folder`, with their weight_map.json.

    Inputs and outputs keep their types: a client changes the file and nothing else.
    """
    single = WeightMap.read(graphs / WEIGHT_MAP)
    weights = WeightMap(
        {
            file: tuple(replace(p, dtype="F16") if p.shape else p for p in placed)
            for file, placed in single.files.items()
        }
    ).sorted()
    for name in GRAPHS:
        model = ir.load(graphs / name)
        _halve_(model.graph)
        place_(model.graph, weights, WEIGHTS[name])
        write_graph(model, folder / name)
    weights.write(folder / WEIGHT_MAP)
    return weights


def _halve_(graph: ir.Graph) -> None:
    (unit,) = (node for node in graph if node.outputs[0].name in UNIT_NORM)
    embedding = unit.inputs[0]  # what becomes of it stays in float32: its norm, and logits
    tail = _tail(graph, embedding)
    for value in list(graph.initializers.values()):
        if value.dtype == ir.DataType.FLOAT:
            _halve_constant_(graph, value, tail)
    for node in list(graph):
        if node not in tail:
            _halve_node_(node)
    for value in graph.inputs:
        if value.dtype == ir.DataType.FLOAT and any(node not in tail for node in value.consumers()):
            cast = _cast(value, HALF)
            ir.convenience.replace_all_uses_with(value, cast.outputs[0])
            cast.replace_input_with(0, value)
            graph.insert_before(graph[0], cast)
    back = _cast(embedding, ir.DataType.FLOAT)
    graph.insert_after(embedding.producer(), back)
    for node, index in embedding.uses():
        if node in tail:
            node.replace_input_with(index, back.outputs[0])


def _halve_constant_(graph: ir.Graph, value: ir.Value, tail: set[ir.Node]) -> None:
    """Constants of the tail stay; one that both parts use is there twice."""
    users = value.uses()
    if not any(node not in tail for node, _ in users):
        return
    if any(node in tail for node, _ in users):
        kept = ir.Value(name=f"{value.name}_single", const_value=value.const_value, type=value.type, shape=value.shape)
        graph.register_initializer(kept)
        for node, index in users:
            if node in tail:
                node.replace_input_with(index, kept)
    if not isinstance(value.const_value, ir.ExternalTensor):
        value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16), name=value.name)
    value.dtype = HALF


def _halve_node_(node: ir.Node) -> None:
    if node.op_type == "Cast" and node.attributes["to"].value == ir.DataType.FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", HALF)
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == ir.DataType.FLOAT:
            node.attributes[name] = ir.AttrTensor(name, ir.tensor(attribute.value.numpy().astype(np.float16)))
    for value in node.outputs:
        if value.dtype == ir.DataType.FLOAT:
            value.dtype = HALF


def _tail(graph: ir.Graph, embedding: ir.Value) -> set[ir.Node]:
    """All nodes that depend on `embedding`, and those that only serve them."""
    tail: set[ir.Node] = set()
    waiting = [embedding]
    while waiting:
        for node in waiting.pop().consumers():
            if node not in tail:
                tail.add(node)
                waiting.extend(node.outputs)
    for node in reversed(graph):
        users = [user for value in node.outputs for user in value.consumers()]
        if users and node is not embedding.producer() and all(user in tail for user in users):
            tail.add(node)
    return tail


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": dtype})
    node.name = node.outputs[0].name = f"{value.name}_as_{dtype.name.lower()}"
    node.outputs[0].dtype, node.outputs[0].shape = dtype, value.shape
    return node
