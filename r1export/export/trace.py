"""Trace a tower with torch.export and translate it into an ONNX graph.

torch.onnx.export decomposes a program before it translates it, which takes longer than both of these together. Most
programs don't need it: their operators change nothing in place and have a translation each. Such a program is translated as it is.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
import torch
from onnxscript.function_libs.torch_lib.ops.core import aten_view
from torch.export import ExportedProgram

from r1export.errors import Unsupported
from r1export.export.simplify import simplify_
from r1export.export.towers import Tower

ONLY_CHECKS = {torch.ops.aten._assert_tensor_metadata.default}  # torch.onnx.export removes these


def trace(tower: Tower, opset: int) -> tuple[ir.Model, set[str]]:
    """The simplified graph of a tower and the state_dict names of the tensors that it uses.

    Raises Unsupported: torch cannot trace or translate the tower at this opset.
    """
    try:
        with quiet(), torch.no_grad():
            program = _translate(tower, opset)
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
    return program.model, used


def _translate(tower: Tower, opset: int) -> torch.onnx.ONNXProgram:
    """The raw graph: without decompositions if it can be had, otherwise as torch.onnx.export makes it by itself."""
    try:
        captured = torch.export.export(tower.module, (tower.example,), dynamic_shapes=_batch(), strict=False)
        if _needs_no_decomposition_(captured):
            captured.run_decompositions = lambda table: captured
            return _to_onnx(captured, tower, opset)
    except Exception:  # whatever the reason, torch.onnx.export knows other ways, and its error is the one to report
        pass
    return _to_onnx(tower.module, tower, opset)


def _to_onnx(source: torch.nn.Module | ExportedProgram, tower: Tower, opset: int) -> torch.onnx.ONNXProgram:
    program = torch.onnx.export(
        source, (tower.example,), dynamo=True, opset_version=opset, optimize=False, verbose=False,
        input_names=[tower.files.input], output_names=[tower.files.output], dynamic_shapes=_batch(),
        custom_translation_table={torch.ops.aten.reshape.default: aten_view},
    )  # fmt: skip
    assert program is not None  # only torch's older exporter gives none
    return program


def _batch() -> tuple[dict[int, torch.export.Dim]]:
    return ({0: torch.export.Dim("batch")},)


def _needs_no_decomposition_(program: ExportedProgram) -> bool:
    """Whether no operator writes into its input. Conversions to the type that a tensor has already are taken out first."""
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.to.dtype and node.meta["val"].dtype == node.args[0].meta["val"].dtype:
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    operators = [node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return not any(operator._schema.is_mutable for operator in operators if operator not in ONLY_CHECKS)


@contextmanager
def lean() -> Iterator[None]:
    """Without what only costs time while graphs are made.

    That is Python's garbage collector, since millions of objects live until the end, and the source lines of every operator.
    """
    collected, omitted = gc.isenabled(), getattr(torch.fx.config, "do_not_emit_stack_traces", False)
    gc.disable()
    torch.fx.config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        torch.fx.config.do_not_emit_stack_traces = omitted
        if collected:
            gc.enable()


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


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else type(error).__name__
