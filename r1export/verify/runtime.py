"""onnxruntime, set up so that measurements can be trusted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort

from r1export.errors import CheckFailed, Unsupported

LEVELS = {
    "disable": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
Run = Callable[[dict[str, np.ndarray]], np.ndarray]


def open_session(graph: Path, *, level: str = "all", provider: str = "cpu", threads: int = 0) -> ort.InferenceSession:
    """A session whose idle threads do not spin: a spinning session slows whatever is timed beside it by a fifth.

    Raises:
        Unsupported: this onnxruntime has not the provider.
        CheckFailed: onnxruntime refuses the model.
    """
    if PROVIDERS[provider] not in ort.get_available_providers():
        raise Unsupported(f"onnxruntime {ort.__version__} has no {PROVIDERS[provider]} here", f"available: {', '.join(ort.get_available_providers())}")
    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(str(graph), options, providers=[PROVIDERS[provider]])
    except Exception as error:  # onnxruntime raises its own classes straight from C++, without a common base
        raise CheckFailed(f"{graph}: onnxruntime refuses the model: {str(error).splitlines()[0][:300]}", "write the release again") from error


def runner(session: ort.InferenceSession) -> Run:
    """Feeds -> the first output."""
    return lambda feeds: session.run(None, feeds)[0]
