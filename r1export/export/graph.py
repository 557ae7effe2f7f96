"""Export once: the ONNX graphs of a model, whatever its weights.

Written from sentinel weights (see weight_map), so nothing that depends on a weight, a task or a date can enter the
bytes: two models of one architecture give the same files.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from r1export.errors import Unsupported
from r1export.export.towers import Tower, make_towers
from r1export.export.weight_map import Placement, WeightMap, externalize_, fill_with_sentinels_, place_parameters
from r1export.update.files import write_file

GRAPHS = ("visual.onnx", "textual.onnx", "classify.onnx")
IR_VERSION = 10  # the oldest that carries opset 20 to 22; onnxruntime reads it from 1.19 on
SENTINEL_SEED = 1


def export_graphs(model: nn.Module, image_size: tuple[int, int], context_length: int, folder: Path, *, opset: int) -> WeightMap:
    """Write visual.onnx, textual.onnx and classify.onnx into `folder`, and weight_map.json that says how to fill them.

    The graphs refer to visual.safetensors and textual.safetensors beside them; classify.onnx shares the visual weights
    and takes the class embeddings as an input.

    Raises Unsupported: the exporter cannot trace the model, or a parameter cannot be placed.
    """
    towers = make_towers(model, image_size, context_length)
    sentinels = fill_with_sentinels_(towers[0].module.model, SENTINEL_SEED)
    placements: dict[str, tuple[Placement, ...]] = {}
    for tower in towers:
        graph = _trace(tower, opset)
        placed = place_parameters(graph.graph, {name: sentinels[name] for name in tower.parameters})
        extra = tuple(Placement(name, sentinels[name].shape) for name in ("logit_scale", "logit_bias") if tower.name == "visual" and name in sentinels)
        placements[f"{tower.name}.safetensors"] = (*placed, *extra)
        weights = WeightMap(placements)
        externalize_(placed, weights.layout(f"{tower.name}.safetensors"), f"{tower.name}.safetensors")
        _write(graph, folder / f"{tower.name}.onnx")
        if tower.name == "visual":
            add_classifier_(graph, weights, "visual.safetensors")
            _write(graph, folder / "classify.onnx")
    weights.write(folder / "weight_map.json")
    return weights


def _trace(tower: Tower, opset: int) -> ir.Model:
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                tower.module, (tower.example,), dynamo=True, opset_version=opset, optimize=True, verbose=False,
                input_names=[tower.input_name], output_names=[tower.output_name], dynamic_shapes=({0: torch.export.Dim("batch")},),
            )  # fmt: skip
    except Exception as error:  # the exporter has no error type of its own for all that it cannot do
        raise Unsupported(f"torch.onnx cannot export the {tower.name} tower at opset {opset}: {_last_line(error)}", "try another opset") from error
    return _anonymous_(program.model)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports progress and advice through warnings and the log; errors still come through."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _anonymous_(model: ir.Model) -> ir.Model:
    """Take out what says where, when and from which source lines the graph was made."""
    model.ir_version = max(IR_VERSION, 11 if model.opset_imports.get("", 0) >= 23 else IR_VERSION)
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
    return model


def add_classifier_(model: ir.Model, weights: WeightMap, location: str) -> None:
    """Turn the visual graph into logits (n, C) = exp(logit_scale) image_embeds class_embeds^T [+ logit_bias]."""
    graph, layout = model.graph, weights.layout(location)
    embeds = graph.outputs[0]
    classes = ir.Input("class_embeds", ir.Shape(["classes", embeds.shape[1]]), ir.TensorType(ir.DataType.FLOAT))
    graph.inputs.append(classes)
    logits = _node(graph, "MatMul", embeds, _node(graph, "Transpose", classes, name="class_embeds_t"), name="cosines")
    for parameter, op in (("logit_scale", "Mul"), ("logit_bias", "Add")):
        if parameter in layout.by_name:
            value = _external(graph, parameter, layout, location)
            operand = _node(graph, "Exp", value, name="scale") if op == "Mul" else value
            logits = _node(graph, op, logits, operand, name=f"logits_{op.lower()}")
    logits.name, logits.type, logits.shape = "logits", ir.TensorType(ir.DataType.FLOAT), ir.Shape([embeds.shape[0], "classes"])
    graph.outputs[0] = logits


def _node(graph: ir.Graph, op: str, *inputs: ir.Value, name: str) -> ir.Value:
    node = ir.node(op, inputs)
    node.outputs[0].name = node.name = name
    graph.append(node)
    return node.outputs[0]


def _external(graph: ir.Graph, name: str, layout: object, location: str) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(np.zeros(layout.by_name[name].shape, np.float32)))
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(layout.by_name[name].shape)
    externalize_({Placement(name, layout.by_name[name].shape): value}, layout, location)
    graph.register_initializer(value)
    return value


def _write(model: ir.Model, path: Path) -> None:
    write_file(path, ir.to_proto(model).SerializeToString(deterministic=True))


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else type(error).__name__
