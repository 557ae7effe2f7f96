"""Check the graphs of a fixed batch against the dynamic graphs and the golden samples of their release."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from r1export.update.release_layout import TOWERS, TowerFiles
from r1export.update.release_manifest import ReleaseManifest
from r1export.verify.golden import manifest_gate, read_golden
from r1export.verify.graph_digest import read_graph
from r1export.verify.parity import Gate, difference
from r1export.verify.results import Check
from r1export.verify.runtimes.runtime import open_session, runner

External = tuple[int, tuple[int, ...], tuple[tuple[str, str], ...]]  # type, shape, and file, offset and length


def check_static_graphs(release: Path, manifest: ReleaseManifest) -> Iterator[Check]:
    """Check each static graph that the manifest lists: fixed shapes, the weights of the dynamic graph, the golden embeddings.

    The weights are the same if both graphs name the same bytes of the same file, which the release's other checks cover.
    Counts are golden samples. Raises CheckFailed if a graph is malformed or cannot be run.
    """
    golden, gate = read_golden(release).tensors(), manifest_gate(manifest)
    for tower in TOWERS:
        if tower.static_graph in manifest.files:
            problems = list(_problems(release, tower, golden, gate))
            count = len(golden[tower.input])
            detail = f"{tower.static_graph} has the weights of {tower.graph} and gives the golden embeddings"
            yield Check.judge(problems, looked_at=count, of=count, detail=detail)


def _problems(release: Path, tower: TowerFiles, golden: Mapping[str, np.ndarray], gate: Gate) -> Iterator[str]:
    name, graph, dynamic = (
        tower.static_graph,
        read_graph(release / tower.static_graph),
        read_graph(release / tower.graph),
    )
    weights, expected = _external(graph), _external(dynamic)
    for parameter in sorted(weights.keys() | expected.keys()):
        if weights.get(parameter) != expected.get(parameter):
            yield f"{name}: {parameter} is not at the place that it has in {tower.graph}"
    sizes = [dim.dim_value for value in graph.graph.input for dim in value.type.tensor_type.shape.dim]
    if not sizes or not all(sizes):
        yield f"{name}: the shape of its input is not fixed"
        return
    measured = difference(golden[tower.output], [_run(release / name, tower, golden[tower.input], sizes[0])])
    if measured.max_abs is None or measured.min_cosine is None:
        yield f"{name}: its embeddings are not finite or have another shape than the golden ones"
    elif not (measured.max_abs <= gate.max_abs and measured.min_cosine >= gate.min_cosine):
        yield f"{name}: differs from the golden embeddings by {measured.max_abs:.2g}, allowed {gate.max_abs:.2g}"


def _external(model: onnx.ModelProto) -> dict[str, External]:
    """The tensors whose bytes are in a weights file."""
    return {
        tensor.name: (
            tensor.data_type,
            tuple(tensor.dims),
            tuple(sorted((entry.key, entry.value) for entry in tensor.external_data)),
        )
        for tensor in model.graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
    }


def _run(graph: Path, tower: TowerFiles, inputs: np.ndarray, batch: int) -> np.ndarray:
    """The embeddings of all inputs; the last batch is filled up with the first inputs."""
    run, count = runner(open_session(graph)), len(inputs)
    filled = np.resize(inputs, (-(-count // batch) * batch, *inputs.shape[1:]))
    return np.concatenate([run({tower.input: part}) for part in np.split(filled, len(filled) // batch)])[:count]
