"""What all contenders share: their row as JSON, faults planted in files, graphs cut to the image tower, tools run as processes.

A contender is a module with `build(work) -> row`, started in its own environment as

    python -m peers.with_NAME WORK

It writes WORK/rows/NAME.json (peers/row.py).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from peers.row import Row, Said

ROOT = Path(__file__).parents[2]
FIRST_LINEAR = "vision_model.encoder.layers.0.mlp.fc1"  # the weight whose sign is flipped as a planted fault
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OLIVE_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip


def enter(name: str, build: Callable[[Path], Row]) -> None:
    """The main function of a contender. What it raises ends the process, and its last line becomes the row."""
    work = Path(sys.argv[1]).resolve()
    rows = work / "rows"
    rows.mkdir(exist_ok=True)
    shutil.rmtree(work / name, ignore_errors=True)
    (work / name).mkdir()
    row = build(work)
    _keep_what_is_timed(work / name, row)
    (rows / f"{name}.json").write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")


def _keep_what_is_timed(folder: Path, row: Row) -> None:
    """Delete everything in `folder` that no graph of the row needs: gigabytes at the size of ViT-B/32."""
    paths = [path for one in row["graphs"].values() for path in (one["graph"], one.get("adapter")) if path]
    kept = {Path(path).relative_to(folder).parts[0] for path in paths}
    for path in folder.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds of the block to `seconds[name]`."""
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def versions(*packages: str) -> dict[str, str]:
    """Versions of the installed `packages` that are there."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, str]:
    """The environment of every process here: no hub, no telemetry, this folder and the project importable."""
    return os.environ | OFFLINE | {"PYTHONPATH": os.pathsep.join((str(ROOT / "benchmarks"), str(ROOT)))}


def run(*arguments: str, code: str = "", folder: Path | None = None) -> Said:
    """Run this environment's python on `arguments`, or on `code` with them: its exit code and the line that tells most."""
    command = [sys.executable, *(["-c", code] if code else []), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=folder, check=False)
    return {"exit_code": done.returncode, "said": telling(done.stdout + done.stderr)}


def telling(output: str) -> str:
    """The last line that speaks of a difference, an error or a failure, without its time stamp; empty if there is none."""
    lines = [line.strip() for line in output.splitlines() if "onnxruntime:Default" not in line]
    lines = [line for line in lines if re.search(r"max diff|difference of|differs|\berror\b|Error:|\bfail", line)]
    return re.sub(r"^[A-Z]\d{4} .*?\] ", "", lines[-1])[:300] if lines else ""


def release_bytes(*paths: Path) -> int:
    """Bytes of files and of everything in folders."""
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    return sum(file.stat().st_size for file in files if file.is_file())


def onnx_embeddings(
    graphs: Mapping[str, Path], inputs: Mapping[str, np.ndarray], adapter: Path | None = None
) -> dict[str, np.ndarray]:
    """Embeddings by onnxruntime; `graphs` maps "image_embeds" and "text_embeds" to the graph that has this output."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    found = {}
    for output, graph in graphs.items():
        session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        names = {value.name for value in session.get_inputs()}
        run_options = ort.RunOptions()
        if adapter is not None:
            lora = ort.LoraAdapter()
            lora.Load(str(adapter))
            run_options.add_active_adapter(lora)
        everything = {**inputs, "attention_mask": np.ones_like(inputs["input_ids"])}
        feeds = {name: value for name, value in everything.items() if name in names}
        found[output] = session.run([output], feeds, run_options)[0]
    return found


def flip_sign(graph: Path, weight: np.ndarray) -> None:
    """Plant a fault: negate the one initializer of `graph` that holds `weight`, straight or transposed."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(graph)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    name = holder({name: numpy_helper.to_array(tensor) for name, tensor in tensors.items()}, weight)
    tensors[name].CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensors[name]), name))
    for path in graph.parent.glob(f"{graph.name}*data"):
        path.unlink()
    onnx.save(model, graph)


def holder(tensors: Mapping[str, np.ndarray], weight: np.ndarray) -> str:
    """The name of the one tensor that holds `weight`, straight or transposed: exporters lose names. Raises ValueError."""
    hits = [
        name
        for name, value in tensors.items()
        if any(value.shape == w.shape and np.allclose(value, w, atol=1e-7) for w in (weight, weight.T))
    ]
    if len(hits) != 1:
        raise ValueError(f"{len(hits)} tensors hold the weight, expected one")
    return hits[0]


def cut_image_tower(graph: Path, out: Path, kept: Sequence[str] = ()) -> Path:
    """The part of a graph of both towers that gives image_embeds; `kept` are inputs that it keeps besides pixel_values."""
    import onnx
    from onnx.utils import Extractor

    model = onnx.load(graph)
    inputs = {value.name: value for value in model.graph.input}
    del model.graph.input[:]  # Olive's ExtractAdapters lists each adapter twice, which onnx refuses
    model.graph.input.extend(inputs.values())
    onnx.save(Extractor(model).extract_model(["pixel_values", *kept], ["image_embeds"]), out)
    return out
