"""ONNX Runtime multi-LoRA: the adapter is an input of the graph, its values come from a file that is active for one run.

Olive's ExtractAdapters makes both: model.onnx with empty adapters (rank 0) as defaults, and adapter_weights.onnx_adapter.
The next task costs another adapter file; no graph is written again and no session opened again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from peers.contender import FIRST_LINEAR, cut_image_tower, enter, onnx_embeddings, release_bytes, timed, versions
from peers.contender import run as run_python
from peers.row import Fault, Graph, Row
from peers.with_olive import BOTH, CONVERT, EXTRACT, RUN, TWICE, config, started
from peers.workload import ALPHA, RANK, parity, read_samples

ADAPTER = "adapter_weights.onnx_adapter"
UNMERGED = CONVERT | {"merge_adapter_weights": False}
PASSES = {"convert": UNMERGED, "extract": EXTRACT}
# All that is asked of an adapter before it is used: load it and run the graph with it.
LOAD = """
import sys
from pathlib import Path
from peers.contender import onnx_embeddings
from peers.workload import read_samples
graph, adapter, work = map(Path, sys.argv[1:])
onnx_embeddings(dict.fromkeys(("image_embeds", "text_embeds"), graph), read_samples(work), adapter)
"""


def build(work: Path) -> Row:
    from olive.workflows import run

    folder = work / "multilora"
    seconds: dict[str, float] = {}
    with timed(seconds, "export"):
        run(config(work, folder / "adapted", PASSES))
    run(config(work, folder / "base", {"convert": CONVERT}, adapted=False))
    graph, adapter = folder / "adapted" / "model.onnx", folder / "adapted" / ADAPTER
    with timed(seconds, "later"):
        write_adapter(work, folder / "later.onnx_adapter")
    assert same(adapter, folder / "later.onnx_adapter"), (
        "the adapter written from PEFT's file is not that of ExtractAdapters"
    )
    return {
        "versions": versions("onnxruntime", "onnxruntime-gpu", "olive-ai", "peft", "transformers", "torch"),
        "first_seconds": seconds["export"], "later_seconds": seconds["later"],
        "release_bytes": release_bytes(*graph.parent.glob("model.onnx*"), adapter), "update_bytes": release_bytes(adapter),
        "parity": parity(onnx_embeddings(dict.fromkeys(BOTH, graph), read_samples(work), adapter), work),
        "faults": faults(work, folder, graph, adapter),
        "graphs": image_towers(folder, graph, adapter),
    }  # fmt: skip


def write_adapter(work: Path, out: Path) -> None:
    """The adapter of the next task from PEFT's file: what a later release costs. The graph wants transposed factors, scaled."""
    from safetensors.numpy import load_file

    values = {}
    for name, value in load_file(work / "adapter" / "adapter_model.safetensors").items():
        scaled = value * np.float32(ALPHA / RANK) if ".lora_B." in name else value
        renamed = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        values[renamed] = np.ascontiguousarray(scaled.T)
    save(values, out)


def save(values: dict[str, np.ndarray], out: Path) -> None:
    import onnxruntime as ort

    written = ort.AdapterFormat()
    written.set_adapter_version(1)
    written.set_model_version(1)
    written.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()})
    written.export_adapter(str(out))


def read(adapter: Path) -> dict[str, np.ndarray]:
    import onnxruntime as ort

    stored = ort.AdapterFormat.read_adapter(str(adapter))
    return {name: value.numpy().copy() for name, value in stored.get_parameters().items()}


def same(one: Path, other: Path) -> bool:
    left, right = read(one), read(other)
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def faults(work: Path, folder: Path, graph: Path, adapter: Path) -> dict[str, Fault]:
    """An adapter with its scaling twice, and one with a negated tensor."""
    out, samples = folder / "fault-merge", read_samples(work)
    made = started(out, config(work, out, PASSES), TWICE + RUN)
    assert made["exit_code"] == 0, made["said"]
    values, name = read(adapter), f"{FIRST_LINEAR}.lora_B.default.weight"
    save(values | {name: -values[name]}, folder / "negated.onnx_adapter")
    found: dict[str, Fault] = {}
    for fault, file in (("merge", out / ADAPTER), ("file", folder / "negated.onnx_adapter")):
        said = run_python(str(graph), str(file), str(work), code=LOAD)
        off = onnx_embeddings(dict.fromkeys(BOTH, graph), samples, file)
        found[fault] = {**said, "off_by": parity(off, work)}
    return found


def image_towers(folder: Path, graph: Path, adapter: Path) -> dict[str, Graph]:
    """The image tower of the plain model, of the model with its adapter, and of the same with the adapter not active."""
    values = {name: value for name, value in read(adapter).items() if name.startswith("vision_model.")}
    save(values, folder / "image.onnx_adapter")
    cut: Graph = {"graph": str(cut_image_tower(graph, folder / "adapted-image.onnx", list(values)))}
    plain: Graph = {"graph": str(cut_image_tower(folder / "base" / "model.onnx", folder / "base-image.onnx"))}
    return {
        "base": plain,
        "off": cut,
        "adapted": {"graph": cut["graph"], "adapter": str(folder / "image.onnx_adapter")},
    }


if __name__ == "__main__":
    enter("multilora", build)
