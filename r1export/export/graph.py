"""Export the ONNX graphs of a model, independent of its weights.

Graphs are exported from sentinel weights (see weight_map), so the files don't depend on weights, tasks or dates: two models
of one architecture give the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from torch import nn

from r1export.errors import InputError, Unsupported
from r1export.export.sentinels import blank_copy, fill_with_sentinels_, flipped, prove
from r1export.export.towers import NOT_IN_A_TOWER, Tower, make_towers
from r1export.export.trace import lean, trace
from r1export.export.weight_map import Placement, WeightMap, externalize_, place_parameters
from r1export.update.atomic_io import write_file
from r1export.update.container import Layout
from r1export.update.release_layout import CLASS_EMBEDS, CLASSIFIER, VISUAL
from r1export.update.run_layout import WEIGHT_MAP

MIN_OPSET, MAX_OPSET = (
    18,
    23,
)  # LayerNormalization needs 17, torch's exporter writes 18; nothing here gains from more than 23
IR_VERSIONS = {18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}  # the oldest that carries each opset
SENTINEL_SEED = 1


@lean()
def export_graphs(
    model: nn.Module, image_size: tuple[int, int], context_length: int, folder: Path, *, opset: int
) -> WeightMap:
    """Write visual.onnx, textual.onnx and classify.onnx into `folder`, and weight_map.json that says how to fill them.

    The graphs refer to visual.safetensors and textual.safetensors in the same folder; classify.onnx shares the visual weights
    and takes the class embeddings as an input. Written only after onnxruntime gave torch's outputs from sentinel weights other than those of the map.

    Raises:
        InputError: `opset` is out of range.
        Unsupported: the exporter cannot trace the model, a parameter cannot be placed, or the graph computes something else.
    """
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise InputError(f"opset {opset} is out of range", f"set export.opset to {MIN_OPSET} to {MAX_OPSET}")
    model = blank_copy(model)
    sentinels = fill_with_sentinels_(model, SENTINEL_SEED)
    towers = make_towers(model, image_size, context_length)
    try:
        graphs, weights = _proven(towers, sentinels, opset, repeat=True)
    except Unsupported:  # blocks that look equal can be called with different arguments
        graphs, weights = _proven(towers, sentinels, opset, repeat=False)
    for name, graph in graphs.items():
        write_graph(graph, folder / name)
    add_classifier_(graphs[VISUAL.graph], weights, VISUAL.weights)
    write_graph(graphs[VISUAL.graph], folder / CLASSIFIER)
    weights.write(folder / WEIGHT_MAP)
    return weights


def _proven(
    towers: Sequence[Tower], sentinels: Mapping[str, np.ndarray], opset: int, *, repeat: bool
) -> tuple[dict[str, ir.Model], WeightMap]:
    """The graphs of both towers by file name, and their weight map, after the proof; equal blocks may `repeat` one.

    Raises Unsupported: see `export_graphs`.
    """
    placements: dict[str, tuple[Placement, ...]] = {}
    graphs: dict[str, ir.Model] = {}
    with flipped(sentinels):  # so what a graph remembers of the map's sentinels shows in the proof
        for tower in towers:
            location = tower.files.weights
            graph, used = trace(tower, opset, repeat=repeat)
            graphs[tower.files.graph] = graph
            placed = place_parameters(graph.graph, {name: sentinels[name] for name in tower.tensors}, used)
            extra = tuple(
                Placement(name, sentinels[name].shape)
                for name in NOT_IN_A_TOWER
                if tower.files == VISUAL and name in sentinels
            )
            placements[location] = (*placed, *extra)
            externalize_(placed, WeightMap(placements).layout(location), location)
            _anonymous_(graph, opset)
    weights = WeightMap(placements)
    prove({tower: graphs[tower.files.graph] for tower in towers}, weights, sentinels)
    return graphs, weights


def _anonymous_(model: ir.Model, opset: int) -> None:
    """Take out what says where, when, how and from which source lines the graph was made."""
    model.ir_version = IR_VERSIONS[opset]
    model.producer_name, model.producer_version, model.doc_string = "r1export", None, None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    _number_(model.graph)


def _number_(graph: ir.Graph) -> None:
    """Name nodes, and values that are no parameter, by operator and order: the same structure has the same bytes."""
    counts: Counter[str] = Counter()
    order: dict[ir.Value, None] = {}
    for node in graph.all_nodes():
        node.name = f"{node.op_type}_{counts[node.op_type]}"
        counts[node.op_type] += 1
        order.update(dict.fromkeys(value for value in node.inputs if value is not None and value.is_initializer()))
        for i, value in enumerate(node.outputs):
            if not value.is_graph_output():
                value.name = f"{node.name}_{i}" if len(node.outputs) > 1 else node.name
    graph.initializers.clear()
    for value in order:
        if not isinstance(value.const_value, ir.ExternalTensor):
            value.name = f"constant_{counts['constant']}"
            counts["constant"] += 1
        graph.register_initializer(value)


def add_classifier_(model: ir.Model, weights: WeightMap, location: str) -> None:
    """Turn the visual graph into logits (n, C) = exp(logit_scale) image_embeds class_embeds^T [+ logit_bias]."""
    graph, layout = model.graph, weights.layout(location)
    embeds = graph.outputs[0]
    classes = ir.val(CLASS_EMBEDS, ir.DataType.FLOAT, ir.Shape(["classes", embeds.shape[1]]))
    graph.inputs.append(classes)
    logits = _node(
        graph, "MatMul", embeds, _node(graph, "Transpose", classes, name=f"{CLASS_EMBEDS}_t"), name="cosines"
    )
    for parameter, op in (("logit_scale", "Mul"), ("logit_bias", "Add")):
        if parameter in layout.by_name:
            value = _external(graph, parameter, layout, location)
            operand = _node(graph, "Exp", value, name="scale") if op == "Mul" else value
            logits = _node(graph, op, logits, operand, name=f"logits_{op.lower()}")
    logits.name, logits.type, logits.shape = (
        "logits",
        ir.TensorType(ir.DataType.FLOAT),
        ir.Shape([embeds.shape[0], "classes"]),
    )
    graph.outputs[0] = logits


def _node(graph: ir.Graph, op: str, *inputs: ir.Value, name: str) -> ir.Value:
    node = ir.node(op, inputs)
    node.outputs[0].name = node.name = name
    graph.append(node)
    return node.outputs[0]


def _external(graph: ir.Graph, name: str, layout: Layout, location: str) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(np.zeros(layout.by_name[name].shape, np.float32)))
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(layout.by_name[name].shape)
    externalize_({Placement(name, layout.by_name[name].shape): value}, layout, location)
    graph.register_initializer(value)
    return value


def write_graph(model: ir.Model, path: Path) -> None:
    """Write a graph without its external weights, atomically and with deterministic bytes."""
    write_file(path, ir.to_proto(model).SerializeToString(deterministic=True))
