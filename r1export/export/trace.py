"""Trace a tower with torch.export and translate it into an ONNX graph.

torch.onnx.export decomposes a program before it translates it, which takes longer than both of these together. Most
programs don't need it: their operators change nothing in place and have a translation each. Such a program is translated as it is.
"""

from __future__ import annotations

import gc
import importlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import onnx_ir as ir
import torch
from onnxscript.function_libs.torch_lib.ops.core import aten_view
from torch import Tensor, nn
from torch.export import ExportedProgram

from r1export.errors import Unsupported
from r1export.export.repeat import Repetition, repeat_, shorten
from r1export.export.simplify import simplify_
from r1export.export.towers import Tower

ONLY_CHECKS = {torch.ops.aten._assert_tensor_metadata.default}  # torch.onnx.export removes these
OTHERWISE = {
    torch.ops.aten.chunk.default
}  # its translation counts the axis from the end, that of its decomposition does not


def trace(tower: Tower, opset: int, *, repeat: bool) -> tuple[ir.Model, set[str]]:
    """The simplified graph of a tower and the state_dict names of the tensors that it uses; equal blocks may `repeat` one.

    Raises Unsupported: torch cannot trace or translate the tower at this opset.
    """
    names = {id(tensor): name for name, tensor in tower.tensors.items()}
    tensors = _tensors(tower.module)
    held = {fqn: names[id(tensor)] for fqn, tensor in tensors.items() if id(tensor) in names}
    try:
        with quiet(), torch.no_grad():
            model, used = _raw(tower, opset, tensors, repeat)
            simplify_(model, held)
    except Exception as error:  # the exporter has no error type of its own for all that it cannot do
        raise Unsupported(
            f"torch.onnx fails to export the {tower.files.name} tower at opset {opset}: {_last_line(error)}",
            "try another opset",
        ) from error
    if model.opset_imports[""] != opset:
        raise Unsupported(
            f"the {tower.files.name} tower was exported at opset {model.opset_imports['']}, expected {opset}",
            "try another opset",
        )
    return model, {held[fqn] for fqn in used if fqn in held}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(
        (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)),
    )


def _raw(tower: Tower, opset: int, tensors: Mapping[str, Tensor], repeat: bool) -> tuple[ir.Model, set[str]]:
    """The graph as it is translated, and the names of the parameters and buffers that it uses.

    From three of its blocks if they repeat, else from all of the tower, else in the ways that torch.onnx.export tries by itself.
    """
    ways: list[tuple[nn.Module, tuple[Repetition, ...]]] = [(tower.module, ())]
    if repeat:
        short, left_out = shorten(tower.module)
        ways = [(short, left_out), *ways] if left_out else ways
    for module, repetitions in ways:
        try:
            program = _translate(module, tower, opset)
            used = _used(program)
            for repetition in repetitions:
                repeat_(program.model.graph, repetition, tensors)
                used |= repetition.everywhere(used)
            return program.model, used
        except Exception:  # whatever the reason, the next way may do, and the error of the last is the one to report
            continue
    program = _to_onnx(tower.module, tower, opset)
    return program.model, _used(program)


def _translate(module: nn.Module, tower: Tower, opset: int) -> torch.onnx.ONNXProgram:
    """The module traced once, and translated without decompositions if that can be done."""
    program = torch.export.export(module, (tower.example,), dynamic_shapes=_batch(), strict=False)
    if _as_it_is_(program):
        program.run_decompositions = lambda table: program  # torch.onnx.export calls it and has no option against it
        try:
            return _to_onnx(program, tower, opset)
        except torch.onnx.errors.OnnxExporterError:  # an operator has no translation
            del program.run_decompositions
    return _to_onnx(program, tower, opset)


def _to_onnx(source: nn.Module | ExportedProgram, tower: Tower, opset: int) -> torch.onnx.ONNXProgram:
    program = torch.onnx.export(
        source, (tower.example,), dynamo=True, opset_version=opset, optimize=False, verbose=False,
        input_names=[tower.files.input], output_names=[tower.files.output], dynamic_shapes=_batch(),
        custom_translation_table={torch.ops.aten.reshape.default: aten_view},
    )  # fmt: skip
    assert program is not None  # only torch's older exporter gives none
    return program


def _batch() -> tuple[dict[int, torch.export.Dim]]:
    return ({0: torch.export.Dim("batch")},)


def _as_it_is_(program: ExportedProgram) -> bool:
    """Whether all operators leave their inputs as they are and are translated as their decompositions are.

    Conversions to the type that a tensor has already are taken out first.
    """
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.to.dtype and node.meta["val"].dtype == node.args[0].meta["val"].dtype:
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    operators = {node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    return not any(operator in OTHERWISE or operator._schema.is_mutable for operator in operators - ONLY_CHECKS)


@contextmanager
def lean() -> Iterator[None]:
    """Without what only costs time while graphs are made.

    That is Python's garbage collector, since millions of objects live until the end, the source lines of every operator, and
    the table of translations for the second tower, which torch.onnx.export makes again in each call.
    """
    collected, omitted = gc.isenabled(), getattr(torch.fx.config, "do_not_emit_stack_traces", False)
    gc.disable()
    torch.fx.config.do_not_emit_stack_traces = True
    try:
        with _one_table():
            yield
    finally:
        torch.fx.config.do_not_emit_stack_traces = omitted
        if collected:
            gc.enable()


@contextmanager
def _one_table() -> Iterator[None]:
    """torch.onnx.export has no option for it. Where a version of torch makes its table in another way nothing changes."""
    try:
        registry = importlib.import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
        made = vars(registry)["from_torchlib"]
    except (ImportError, AttributeError, KeyError):
        yield
        return
    registry.from_torchlib = staticmethod(cache(registry.from_torchlib))
    try:
        yield
    finally:
        registry.from_torchlib = made


def _used(translated: torch.onnx.ONNXProgram) -> set[str]:
    """Names of the parameters and buffers on which some node of the program depends."""
    program = translated.exported_program
    assert program is not None  # only a program that was read from a file has none
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
