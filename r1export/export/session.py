"""onnxruntime as the export needs it: on the CPU, silent, without threads that spin while they wait."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort


def open_session(model: bytes | Path, weights: Path | None = None, *, once: bool = False) -> ort.InferenceSession:
    """A session on a graph in a file, or in memory with its weights in the folder `weights`.

    If it runs only `once` the weights are not packed, which would take half as long as the run.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.disable_prepacking", "1" if once else "0")
    if weights is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    source = model if isinstance(model, bytes) else str(model)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
