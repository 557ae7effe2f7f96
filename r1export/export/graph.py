"""Export the ONNX graphs of a model, independent of its weights.

Graphs are exported from sentinel weights (see weight_map), so the files don't depend on weights, tasks or dates: two models
of one architecture give the same bytes.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from r1export.errors import InputError, Unsupported
from r1export.export.sentinels import fill_with_sentinels_, prove
from r1export.export.simplify import simplify_
from r1export.export.towers import NOT_IN_A_TOWER, Tower, make_towers
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
SENTINEL_SEED, PROOF_SEED = 1, 2


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
    model = copy.deepcopy(model).cpu().float().eval()
    sentinels = fill_with_sentinels_(model, SENTINEL_SEED)
    towers = make_towers(model, image_size, context_length)
    placements: dict[str, tuple[Placement, ...]] = {}
    graphs: dict[str, ir.Model] = {}
    for tower in towers:
        location = tower.files.weights
        graphs[tower.files.graph], used = trace(tower, opset)
        placed = place_parameters(
            graphs[tower.files.graph].graph, {name: sentinels[name] for name in tower.tensors}, used
        )
        extra = tuple(
            Placement(name, sentinels[name].shape)
            for name in NOT_IN_A_TOWER
            if tower.files == VISUAL and name in sentinels
        )
        placements[location] = (*placed, *extra)
        externalize_(placed, WeightMap(placements).layout(location), location)
    weights = WeightMap(placements)
    others = fill_with_sentinels_(model, PROOF_SEED)  # what a graph remembers of the first sentinels shows with these
    prove({t.with_current_weights(): graphs[t.files.graph] for t in towers}, weights, others)
    for name, graph in graphs.items():
        write_graph(graph, folder / name)
    add_classifier_(graphs[VISUAL.graph], weights, VISUAL.weights)
    write_graph(graphs[VISUAL.graph], folder / CLASSIFIER)
    weights.write(folder / WEIGHT_MAP)
    return weights


def trace(tower: Tower, opset: int) -> tuple[ir.Model, set[str]]:
    """The simplified graph of a tower and the state_dict names of the tensors that it uses."""
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                tower.module, (tower.example,), dynamo=True, opset_version=opset, optimize=False, verbose=False,
                input_names=[tower.files.input], output_names=[tower.files.output], dynamic_shapes=({0: torch.export.Dim("batch")},),
            )  # fmt: skip
            assert program is not None  # only torch's older exporter gives none
            assert program.exported_program is not None
            names = {id(tensor): name for name, tensor in tower.tensors.items()}
            inside = dict(
                (
                    *tower.module.named_parameters(remove_duplicate=False),
                    *tower.module.named_buffers(remove_duplicate=False),
                )
            )
            held = {fqn: names[id(tensor)] for fqn, tensor in inside.items() if id(tensor) in names}
            used = {held[fqn] for fqn in _used(program.exported_program) if fqn in held}
            simplify_(program.model, held)
    except Exception as error:  # the exporter has no error type of its own for all that it cannot do
        raise Unsupported(
            f"torch.onnx fails to export the {tower.files.name} tower at opset {opset}: {_last_line(error)}",
            "try another opset",
        ) from error
    if program.model.opset_imports[""] != opset:
        raise Unsupported(
            f"the {tower.files.name} tower was exported at opset {program.model.opset_imports['']}, expected {opset}",
            "try another opset",
        )
    return _anonymous_(program.model, opset), used


def _used(program: torch.export.ExportedProgram) -> set[str]:
    """Names of the parameters and buffers on which some node of the program depends."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return {
        names[node.name]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in names and node.users
    }


@contextmanager
def quiet() -> Iterator[None]:
    """The exporter reports progress and advice through warnings and the log; errors still come through."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _anonymous_(model: ir.Model, opset: int) -> ir.Model:
    """Take out what says where, when and from which source lines the graph was made."""
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
    return model


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


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else type(error).__name__
