"""What OpenVINO executes: the compiled graph, with the kernel chosen for each node.

OpenVINO's profile is not reliable evidence: kernels faster than its microsecond clock count as not executed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from r1export.errors import CheckFailed
from r1export.verify.runtimes.openvino_runtime import compile_graph
from r1export.verify.runtimes.ort_profile import Execution, Kernel, Shape
from r1export.verify.runtimes.runtime import check_provider, first_error_line

if TYPE_CHECKING:
    import openvino

CHOSEN = ("layerType", "primitiveType", "outputPrecisions", "outputLayouts")


def execute(graph: Path, feeds: Mapping[str, np.ndarray]) -> Execution:
    """Compile `graph`, run it once, and say what ran. FLOPs are not counted: attention may be one kernel with no known formula.

    Raises:
        Unsupported: OpenVINO is not installed.
        CheckFailed: it rejects the model or the inputs.
    """
    check_provider("openvino")
    try:
        model = compile_graph(graph)
        model.create_infer_request().infer(dict(feeds))
    except RuntimeError as error:
        raise CheckFailed(
            f"{graph}: OpenVINO fails to run it: {first_error_line(error)}", "export the release again"
        ) from error
    nodes = sorted(model.get_runtime_model().get_ops(), key=lambda node: int(_fact(node, "execOrder")))
    kernels = tuple(_kernel(node) for node in nodes if not _is_constant(node))
    weights = sum(_nbytes(node) for node in nodes if _is_constant(node))
    return Execution(_digest(nodes), len(nodes), kernels, weights, peak_bytes=None, flops=None)


def _fact(node: openvino.Node, name: str) -> str:
    return str(node.rt_info[name].astype(str))


def _is_constant(node: openvino.Node) -> bool:
    return _fact(node, "layerType") == "Const"


def _digest(nodes: Sequence[openvino.Node]) -> str:
    """SHA-256 over kernels, precisions, layouts, shapes and edges, whatever the names and the weights."""
    numbers = {node.get_friendly_name(): i for i, node in enumerate(nodes)}
    lines = [
        [
            *(_fact(node, name) for name in CHOSEN),
            _shapes(node.outputs()),
            [numbers[value.get_source_output().get_node().get_friendly_name()] for value in node.inputs()],
        ]
        for node in nodes
    ]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def _kernel(node: openvino.Node) -> Kernel:
    """One node of the compiled graph, which runs them in their order. Types and shapes are those of the last run."""
    ends = [value.get_source_output() for value in node.inputs()], node.outputs()
    one, other = (
        tuple((str(end.get_element_type()), shape) for end, shape in zip(side, _shapes(side), strict=True))
        for side in ends
    )
    return Kernel(_fact(node, "layerType"), _fact(node, "primitiveType"), one, other)


def _shapes(outputs: Sequence[openvino.Output]) -> list[Shape]:
    """Sizes of each output as they were in the last run; -1 where they are open."""
    return [tuple(d.get_length() if d.is_static else -1 for d in output.get_partial_shape()) for output in outputs]


def _nbytes(constant: openvino.Node) -> int:
    return int(prod(constant.get_output_shape(0)) * constant.get_output_element_type(0).size)
