"""Simplify an exported graph without computing anything from a weight.

Rules and folding act on constants that the architecture makes. A parameter may be moved about (transposed, reshaped),
never combined with another or with a number: it would be lost to the weight map. Equal initializers are not merged,
since two biases that are both zero are equal only until one is trained.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules import common as rules

from r1export.export.portable import portable_

RULES = (
    rules.no_op_cast_rule, rules.cast_cast_rule, rules.no_op_expand_rule, rules.no_op_transpose_rule, rules.transpose_transpose_rule,
    rules.reshape_reshape_rule, rules.squeeze_reshape_1d_rule, rules.unsqueeze_unsqueeze_rule, rules.slice_split_rule,
    rules.collapse_slice_rule, rules.collapse_slice2_rule, rules.materialize_reshape_shape_rule, rules.cast_constant_of_shape_rule,
    rules.one_reshape_matmul_reshape_rule, rules.two_reshapes_matmul_reshape_rule, rules.dropout_inference_rule, rules.dropout_zero_rule,
)  # fmt: skip
MOVES = {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity"}  # what may be folded into a parameter
CONSTANT_ELEMENTS = 1 << 20  # the largest constant that folding may make: a causal mask or a table of rotations


def simplify_(model: ir.Model, parameters: Collection[str]) -> None:
    """Fold, rewrite and clean `model` in place; `parameters` are the initializers that hold weights."""
    common.InlinePass()(model)
    held: set[str | None] = set(parameters)

    def should_fold(node: ir.Node) -> bool | None:
        touched = [value for value in node.inputs if value is not None and value.name in held]
        if not touched:
            return None
        if node.op_type in MOVES:
            held.update(value.name for value in node.outputs)  # the result is a weight as well
            return True
        return False

    def fold() -> None:
        fold_constants(model, should_fold=should_fold, output_size_limit=CONSTANT_ELEMENTS, onnx_shape_inference=True)

    fold()
    rewrite(model, RULES)
    fold()  # what the rules uncover; nothing is left for them then
    portable_(model.graph)
    for clean in (
        common.RemoveUnusedNodesPass(), common.RemoveUnusedFunctionsPass(), common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.CommonSubexpressionEliminationPass(), common.OutputFixPass(), common.NameFixPass(),
    ):  # fmt: skip
        clean(model)
