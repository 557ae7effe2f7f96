"""What onnxruntime executes: the optimized graph, the profiled kernels, and their cost."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from r1export.verify.graph_digest import graph_digest
from r1export.verify.runtimes.runtime import runner, session_options, start

MOVES = {"Cast", "Concat", "Expand", "Flatten", "Gather", "Identity", "MemcpyFromHost", "MemcpyToHost", "ReorderInput", "ReorderOutput",
         "Reshape", "Shape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"}  # fmt: skip
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Kernel:
    """One executed operator: its name, the provider that ran it, and the types and shapes that went in and came out."""

    op: str
    provider: str
    inputs: tuple[tuple[str, Shape], ...]
    outputs: tuple[tuple[str, Shape], ...]

    @property
    def flops(self) -> int:
        """Floating-point operations, a multiply-add counted as two; data movement costs none, the rest one per element."""
        if self.op in MOVES or not self.outputs:
            return 0
        out, shapes = prod(self.outputs[0][1]), [shape for _, shape in self.inputs]
        if "Conv" in self.op:
            # The weight is the one input of as many axes; where it was packed when the session was opened, none is shown.
            weight = next((shape for shape in shapes[1:] if len(shape) == len(shapes[0]) > 1), None)
            return 2 * out * prod(weight[1:]) if weight else out
        if "Attention" in self.op and len(shapes) > 1 and len(shapes[1]) > 2:
            return 4 * prod(shapes[0]) * shapes[1][-2]  # Q K^T and P V
        if "MatMul" in self.op or "Gemm" in self.op:
            # The profile does not show a weight that was packed when the session was opened; a bias may stand in its place.
            left, right = shapes[0], next((shape for shape in shapes[1:] if len(shape) > 1), None)
            transposed = right is not None and left[-1] not in right[-2:]
            return 2 * out * left[-2 if transposed else -1]
        return out


@dataclass(frozen=True)
class Execution:
    """The execution of one graph on one provider. `peak_bytes` is the session's peak memory; None if unknown."""

    optimized_digest: str
    optimized_nodes: int
    kernels: tuple[Kernel, ...]
    weight_bytes: int
    peak_bytes: int | None
    flops: int | None

    @property
    def ops_digest(self) -> str:
        """SHA-256 of the sequence of (op, provider, types and shapes)."""
        return hashlib.sha256(repr(self.kernels).encode()).hexdigest()

    def count(self) -> Counter[str]:
        """How often each operator ran."""
        return Counter(kernel.op for kernel in self.kernels)


def execute(graph: Path, feeds: Mapping[str, np.ndarray], provider: str = "cpu") -> Execution:
    """Optimise `graph` as clients do (all levels), run it once, and say what ran.

    Raises:
        Unsupported: this onnxruntime has not the provider.
        CheckFailed: onnxruntime rejects the model or the inputs, or fell back to another provider.
    """
    with tempfile.TemporaryDirectory() as folder:
        optimized, options = Path(folder) / "optimized.onnx", session_options()
        if os.name == "posix":  # only the graph is read; its weights would be some hundred megabytes
            (Path(folder) / "weights.bin").symlink_to(os.devnull)
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.log_severity_level = (
            4  # it warns that the optimized graph is specific to this machine, which is intended
        )
        session = start(graph, options, provider)
        runner(session)(dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        model = onnx.load(optimized, load_external_data=False)
    nodes = [event["args"] for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    peaks = [int(node["mem_in_use_peak"]) for node in nodes if "mem_in_use_peak" in node]
    kernels = tuple(map(_kernel, nodes))
    return Execution(
        graph_digest(model, structural=True),
        len(model.graph.node),
        kernels,
        _weight_bytes(model),
        max(peaks, default=None),
        sum(kernel.flops for kernel in kernels),
    )


def _kernel(args: Mapping[str, Any]) -> Kernel:
    return Kernel(
        args["op_name"],
        args["provider"],
        _typed(args.get("input_type_shape", [])),
        _typed(args.get("output_type_shape", [])),
    )


def _typed(values: list[Mapping[str, list[int]]]) -> tuple[tuple[str, Shape], ...]:
    return tuple((kind, tuple(shape)) for value in values for kind, shape in value.items())


def _weight_bytes(model: onnx.ModelProto) -> int:
    return sum(
        prod(t.dims) * onnx.helper.tensor_dtype_to_np_dtype(t.data_type).itemsize for t in model.graph.initializer
    )
