"""OpenVINO's runtime, which reads the .onnx files and their external weights directly."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import openvino

# By default it computes in bfloat16 if supported, with an error of 2e-3, and may quantize activations.
# Pinned threads would slow other contenders.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "ENABLE_CPU_PINNING": "NO"}


def installed() -> bool:
    """Whether OpenVINO is installed, without importing it."""
    return importlib.util.find_spec("openvino") is not None


def library() -> ModuleType:
    """The module `openvino`. Without this it would report each import over the network and leave files in the home folder."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return importlib.import_module("openvino")


def compile_graph(graph: Path, *, threads: int = 0) -> openvino.CompiledModel:
    """The graph compiled for the CPU in float32; `threads` 0 leaves their number to OpenVINO. Raises RuntimeError."""
    core = library().Core()
    options = EXACT | ({"INFERENCE_NUM_THREADS": str(threads)} if threads else {})
    return core.compile_model(core.read_model(graph), "CPU", options)


class Compiled:
    """A compiled graph with one request, called as onnxruntime's sessions are."""

    def __init__(self, model: openvino.CompiledModel) -> None:
        self._request = model.create_infer_request()

    def run(self, outputs: None, feeds: dict[str, np.ndarray], /) -> list[np.ndarray]:
        """All outputs, in the order of the graph. Raises RuntimeError for inputs that the graph does not take."""
        return list(self._request.infer(feeds, share_inputs=True).values())
