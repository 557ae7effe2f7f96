"""What `runtime_matrix.py` runs in each environment: golden samples through one runtime, with numpy and the device kit alone.

    PYTHONPATH=r1device.pyz python runtime_probe.py RUNTIME FOLDER      RUNTIME: onnxruntime, openvino, reference or overlay

Opens every graph of a release folder and prints one JSON line with the differences to the stored outputs. With `overlay`,
FOLDER is the store of a device, whose weights onnxruntime is handed at load.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from r1export.device.version import open_version
from r1export.update.container import read_tensors

Run = Callable[[dict[str, np.ndarray]], np.ndarray]
TOWERS = {"visual": ("pixel_values", "image_embeds"), "textual": ("input_ids", "text_embeds")}
# As in r1export/verify/runtimes/openvino_runtime.py, which needs more than a device has.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def opener(runtime: str, folder: Path) -> tuple[str, Callable[[str], Run]]:
    """The runtime's version, and what opens a graph of the folder by its name."""
    if runtime == "openvino":
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # no module: it would report home
        import openvino

        core = openvino.Core()
        return openvino.__version__.split("-")[0], lambda name: first(
            core.compile_model(core.read_model(folder / name), "CPU", EXACT)
        )
    if runtime == "reference":
        import onnx
        from onnx.reference import ReferenceEvaluator

        return onnx.__version__, lambda name: first_of(ReferenceEvaluator(str(folder / name)))
    import onnxruntime

    if runtime == "overlay":
        version = open_version(folder)
        return onnxruntime.__version__, lambda name: first_of(version.session(name))
    return onnxruntime.__version__, lambda name: first_of(
        onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
    )


def first(compiled: Any) -> Run:
    return lambda feeds: compiled(feeds)[0]


def first_of(session: Any) -> Run:
    return lambda feeds: session.run(None, feeds)[0]


def differences(golden: dict[str, np.ndarray], runs: dict[str, Run]) -> dict[str, float]:
    """Largest difference and lowest cosine over both towers, one sample at a time and all at once."""
    worst, lowest = 0.0, 1.0
    for tower, (given, answer) in TOWERS.items():
        values, wanted = golden[given], golden[answer].astype(np.float64)
        for size in (1, len(values)):
            parts = [runs[tower]({given: values[i : i + size]}) for i in range(0, len(values), size)]
            found = np.concatenate(parts).astype(np.float64)
            norms = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
            worst = max(worst, float(np.abs(found - wanted).max()))
            lowest = min(lowest, float(((found * wanted).sum(1) / norms).min()))
    return {"max_abs": worst, "min_cosine": lowest}


def main(runtime: str, place: str) -> None:
    folder = Path(place)
    version, start = opener(runtime, folder)
    graphs = sorted((folder / "base" if runtime == "overlay" else folder).glob("*.onnx"))
    runs = {path.stem: start(path.name) for path in graphs}
    with tempfile.TemporaryDirectory() as name:
        golden = folder / "golden.safetensors"
        if runtime == "overlay":  # the store keeps it inside the update
            golden = Path(name) / golden.name
            golden.write_bytes(open_version(folder).read(golden.name))
        print(json.dumps({"version": version, "graphs": sorted(runs)} | differences(read_tensors(golden), runs)))


if __name__ == "__main__":
    main(*sys.argv[1:])
