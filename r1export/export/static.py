"""Graphs of one fixed batch, for compilers that take no dynamic dimension (QNN, RKNN, Hailo).

They are made from the dynamic graphs and refer to the same bytes of the same weights files. Fixing the batch turns
shapes into constants, and the nodes that computed them go. The opset is 18, which compilers support that stop
at 19; only Gelu has to be written otherwise for it (it came with 20). Convolutions pad by themselves.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.inliner
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules.common import fuse_pad_into_conv_rule

from r1export.errors import Unsupported, first_line
from r1export.export.graph import IR_VERSIONS, write_graph
from r1export.export.simplify import CONSTANT_ELEMENTS
from r1export.export.trace import quiet
from r1export.update.release_layout import TOWERS

STATIC_OPSET = 18
ROUNDS = 2  # the second folds what follows from the shapes that the first inferred


def static_graphs(graphs: Path, batch: int) -> None:
    """Write visual.static.onnx and textual.static.onnx next to the graphs of both towers in `graphs`.

    Inputs and outputs keep their names and types; the first dimension of their shapes is `batch`.

    Raises Unsupported: a dimension stays dynamic, or opset 18 lacks an operator of the graph.
    """
    for tower in TOWERS:
        model = ir.from_proto(_at_opset_18(onnx.load(graphs / tower.graph, load_external_data=False)))
        with quiet():  # the optimizer warns that there are no weights, which nothing here needs
            _fix_(model, batch)
        _check(model, tower.static_graph)
        write_graph(model, graphs / tower.static_graph)


def _at_opset_18(model: onnx.ModelProto) -> onnx.ModelProto:
    """With Gelu written as its definition in the ONNX standard; all else computes the same in both opsets."""
    model = onnx.inliner.inline_selected_functions(model, [("", "Gelu")], inline_schema_functions=True)
    for node in model.graph.node:
        if node.op_type == "Sum" and len(node.input) == 2:  # in that definition; LiteRT's converter broadcasts Add only
            node.op_type = "Add"
    model.ir_version = IR_VERSIONS[STATIC_OPSET]
    next(opset for opset in model.opset_import if not opset.domain).version = STATIC_OPSET
    return model


def _fix_(model: ir.Model, batch: int) -> None:
    """Give the inputs their batch, and fold what follows from it; weights are left alone."""
    graph = model.graph
    for value in graph.inputs:
        value.shape = ir.Shape([batch, *(value.shape or ())[1:]])
    for value in (value for node in graph for value in node.outputs):
        value.shape = None  # that of the dynamic batch: it is inferred again
    weights = {value for value in graph.initializers.values() if isinstance(value.const_value, ir.ExternalTensor)}

    def should_fold(node: ir.Node) -> bool | None:
        return False if weights & set(node.inputs) else None

    for _ in range(ROUNDS):
        fold_constants(model, should_fold=should_fold, output_size_limit=CONSTANT_ELEMENTS, onnx_shape_inference=True)
    rewrite(model, [fuse_pad_into_conv_rule])  # RKNN's compiler fails on Pad
    for clean in (
        common.RemoveUnusedNodesPass(), common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.CommonSubexpressionEliminationPass(), common.OutputFixPass(), common.NameFixPass(),
    ):  # fmt: skip
        clean(model)


def _check(model: ir.Model, name: str) -> None:
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    if dynamic := [value.name for value in values if value.shape is None or not value.shape.is_static()]:
        raise Unsupported(f"{name}: the shape of {dynamic[0]} stays dynamic", "leave export.static_batch at 0")
    context = onnx.checker.C.CheckerContext()
    context.ir_version, context.opset_imports = model.ir_version, model.opset_imports
    try:
        for node in ir.to_proto(model).graph.node:  # the whole model has no weights yet, which its check would ask for
            onnx.checker.check_node(node, context)
    except onnx.checker.ValidationError as error:
        raise Unsupported(
            f"{name} is not a graph of opset {STATIC_OPSET}: {first_line(error)}", "leave export.static_batch at 0"
        ) from error
