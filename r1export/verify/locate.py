"""Find the first node where an exported graph diverges from torch, and write a minimal reproducer.

Torch records the input and output of every module that owns parameters. The graph's initializers have the parameters'
names, so the nodes that use them identify the corresponding values in ONNX. The nodes between the last values that agree
and the first that does not contain the cause.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, external_data_helper, numpy_helper

from r1export.errors import CheckFailed
from r1export.update.atomic_io import new_folder
from r1export.verify.graph_digest import read_graph
from r1export.verify.runtimes.runtime import first_error_line, session_options

NOISE = {
    "fp32": 2e-7,
    "fp16": 5e-4,
    "int8": 2e-2,
}  # relative error that rounding explains at the start of a network
JUMP = 10  # a growth of the error by this factor is not rounding
SCRIPT = """import numpy as np, onnxruntime as ort
case = dict(np.load("case.npz")); expected = case.pop("expected")
found = ort.InferenceSession("case.onnx", providers=["CPUExecutionProvider"]).run(None, case)[0]; print("max abs difference", abs(found - expected).max())
"""


@dataclass(frozen=True)
class Boundary:
    """What torch has at the input or output of the module that owns `module.weight`."""

    module: str
    side: str  # "in" or "out"
    value: np.ndarray


@dataclass(frozen=True)
class Divergence:
    """The first value that diverges from torch. Errors are relative to the largest entry of torch's value."""

    value: str
    place: str
    error: float
    before: float
    nodes: tuple[tuple[str, str], ...]
    parameters: tuple[str, ...]

    def __str__(self) -> str:
        name, op = self.nodes[-1]
        others = (
            f" (or the {len(self.nodes) - 1} nodes before it, from {self.nodes[0][0]} on)"
            if len(self.nodes) > 1
            else ""
        )
        parameters = f", parameters {', '.join(self.parameters)}" if self.parameters else ", no parameters"
        return f"first diverging node: {op} {name}{others} at {self.place}{parameters}; relative error {self.before:.1g} before it, {self.error:.1g} after it"


def locate(
    graph: Path,
    feeds: Mapping[str, np.ndarray],
    boundaries: Sequence[Boundary],
    expected: np.ndarray,
    reproducer: Path | None = None,
    precision: str = "fp32",
) -> Divergence | None:
    """The first divergence of `graph` from torch on `feeds`; None if none is detected.

    `expected` is torch's output. `reproducer` is a new folder for a minimal graph, its inputs, the expected value and a
    three-line script. Raises CheckFailed if the graph fails to run.
    """
    model = read_graph(graph)
    known = dict(_matched(model.graph, boundaries))
    known[model.graph.output[0].name] = Boundary("output", "out", expected)
    values = [name for node in model.graph.node for name in node.output if name in known]
    found = _intermediates(model, graph.parent, feeds, values)
    # A value of another size only looks like torch's: a widened weight, or tokens in another order of axes.
    order = [name for name in values if found[name].size == known[name].value.size]
    errors = {name: _relative(found[name], known[name].value) for name in order}
    at = _first_jump([errors[name] for name in order], NOISE[precision])
    if at is None:
        return None
    bad, good = order[at], {name: known[name].value.reshape(found[name].shape) for name in order[:at]}
    nodes, edges = _between(model.graph, bad, {*good, *feeds})
    weights = {t.name for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL}
    parameters = tuple(dict.fromkeys(name for node in nodes for name in node.input if name in weights))
    where = known[bad]
    place = (
        "the output"
        if where.module == "output"
        else f"the {'input' if where.side == 'in' else 'output'} of {where.module}"
    )
    before = max((errors[name] for name in edges if name in errors), default=0.0)
    if reproducer is not None:
        inputs = {name: good[name].astype(found[name].dtype) if name in good else feeds[name] for name in edges}
        expected = known[bad].value.reshape(found[bad].shape)
        _write_case(model, graph.parent, nodes, inputs, expected, (bad, found[bad].dtype), reproducer)
    return Divergence(bad, place, errors[bad], before, tuple((node.name, node.op_type) for node in nodes), parameters)


def _matched(graph: onnx.GraphProto, boundaries: Sequence[Boundary]) -> Iterator[tuple[str, Boundary]]:
    """ONNX value -> what torch has there."""
    initializers = {tensor.name for tensor in graph.initializer}
    first: dict[str, str] = {}
    last: dict[str, str] = {}
    for node in graph.node:
        for owner in {_owner(name) for name in node.input if name in initializers}:
            data = [name for name in node.input if name and name not in initializers]
            first.setdefault(owner, data[0] if data else "")
            last[owner] = node.output[0]
    for boundary in boundaries:
        name = (first if boundary.side == "in" else last).get(boundary.module)
        if name:
            yield name, boundary


def _owner(parameter: str) -> str:
    """blocks.0.ln_1.weight -> blocks.0.ln_1; blocks.0.attn.in_proj_bias -> blocks.0.attn.in_proj."""
    for suffix in (".weight", ".bias", "_weight", "_bias"):
        if parameter.endswith(suffix):
            return parameter.removesuffix(suffix)
    return parameter


def _intermediates(
    model: onnx.ModelProto, folder: Path, feeds: Mapping[str, np.ndarray], names: Sequence[str]
) -> dict[str, np.ndarray]:
    """The named values, without graph optimization, so that each of them exists."""
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    outputs = {value.name for value in model.graph.output}
    opened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name not in outputs)
    options = session_options("disable")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    try:
        session = ort.InferenceSession(opened.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return dict(zip(names, session.run(list(names), dict(feeds)), strict=True))
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise CheckFailed(
            f"cannot compute the graph's intermediate values: {first_error_line(error)}", "export the graphs again"
        ) from error


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over largest value; infinite for NaN."""
    difference = np.abs(found.astype(np.float64).ravel() - expected.astype(np.float64).ravel()).max(initial=0)
    return float(difference / max(np.abs(expected).max(initial=0), 1e-12)) if np.isfinite(difference) else float("inf")


def _first_jump(errors: Sequence[float], noise: float) -> int | None:
    level = noise
    for i, error in enumerate(errors):
        if error > JUMP * level:
            return i
        level = max(level, error)
    return None


def _between(graph: onnx.GraphProto, value: str, known: set[str]) -> tuple[list[onnx.NodeProto], list[str]]:
    """The nodes that compute `value` from `known` values, in order, and the known values that they use."""
    makers = {name: i for i, node in enumerate(graph.node) for name in node.output}
    wanted, nodes, edges = [value], set(), []
    while wanted:
        name = wanted.pop()
        if name in known and name != value:
            edges.append(name)
        elif name in makers and makers[name] not in nodes:
            nodes.add(makers[name])
            wanted += graph.node[makers[name]].input
    return [graph.node[i] for i in sorted(nodes)], list(dict.fromkeys(edges))


def _write_case(
    model: onnx.ModelProto,
    folder: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, np.ndarray],
    expected: np.ndarray,
    value: tuple[str, np.dtype],
    out: Path,
) -> None:
    """Write case.onnx (only these nodes, with their weights), case.npz (inputs and expected output) and reproduce.py."""
    name, dtype = value
    used = {name for node in nodes for name in node.input}
    weights = [_inlined(tensor, folder) for tensor in model.graph.initializer if tensor.name in used]
    ends = [
        onnx.helper.make_tensor_value_info(end, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for end, array in inputs.items()
    ]
    case = onnx.helper.make_graph(list(nodes), "case", ends, [onnx.ValueInfoProto(name=name)], weights)
    case.output[0].type.tensor_type.elem_type = onnx.helper.np_dtype_to_tensor_dtype(dtype)
    whole = onnx.helper.make_model(case, opset_imports=model.opset_import, ir_version=model.ir_version)
    with new_folder(out) as place:
        onnx.save(whole, place / "case.onnx")
        arrays: dict[str, Any] = {"expected": expected, **inputs}
        np.savez(place / "case.npz", **arrays)
        (place / "reproduce.py").write_text(SCRIPT, encoding="utf-8")


def _inlined(tensor: TensorProto, folder: Path) -> TensorProto:
    """The initializer with its bytes inline."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return tensor
    copy = TensorProto()
    copy.CopyFrom(tensor)
    external_data_helper.load_external_data_for_tensor(copy, str(folder))
    return numpy_helper.from_array(numpy_helper.to_array(copy), tensor.name)
