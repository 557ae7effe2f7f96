"""A run with static graphs: released, verified, sent to a device without a byte, and found wrong if one is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper
from running import RECIPE, SETTINGS, Lab, r1export, reseal

from r1export.update.atomic_io import sha256_file
from r1export.update.bundle import split
from r1export.update.manifest import Manifest
from r1export.update.release_layout import STATIC_GRAPHS, VISUAL


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("static")
    (folder / "recipe.toml").write_text(RECIPE)
    sets = [part for setting in (*SETTINGS, "export.static_batch=1") for part in ("--set", setting)]
    for command in (("train", folder / "recipe.toml", "--out", folder / "run", *sets), ("export", folder / "run")):
        done = r1export(*command)
        assert done.returncode == 0, done.output
    return Lab.of(folder / "run")


@pytest.fixture
def release(lab: Lab, tmp_path: Path) -> Path:
    """A copy of release 01 that a test may change."""
    return Path(shutil.copytree(lab.release(1), tmp_path / lab.release(1).name))


def verdict_of(release: Path) -> tuple[int, str]:
    """The exit code of `verify RELEASE`, and what it says of the graphs."""
    done = r1export("verify", release, "--no-latency", "--json")
    return done.returncode, json.loads(done.stdout)["contents"]["graphs"]["detail"]


def test_all_releases_have_the_same_static_graphs_and_verification_runs_them(lab: Lab) -> None:
    releases = json.loads((lab.run / "report.json").read_text())["releases"]
    for release in releases:
        graphs = release["contents"]["graphs"]
        assert graphs["verdict"] == "pass"
        assert "visual.static.onnx has the weights of visual.onnx and gives the golden embeddings" in graphs["detail"]
    for name in STATIC_GRAPHS:
        assert sha256_file(lab.release(0) / name) == sha256_file(lab.release(1) / name)


def test_a_release_is_verified_with_them_by_itself(release: Path) -> None:
    code, detail = verdict_of(release)
    assert code == 0
    assert "5 graphs have their released structure" in detail
    assert "textual.static.onnx has the weights of textual.onnx" in detail


def edit(graph: Path, change) -> None:
    """Change a graph and reseal its release, as a faulty exporter would have written it."""
    model = onnx.load(graph, load_external_data=False)
    change(model)
    onnx.save(model, graph)
    reseal(graph.parent)


def test_a_static_graph_that_computes_something_else_fails(release: Path) -> None:
    def other_epsilon(model: onnx.ModelProto) -> None:
        norm = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
        next(attribute for attribute in norm.attribute if attribute.name == "epsilon").f = 0.1

    edit(release / VISUAL.static_graph, other_epsilon)
    code, detail = verdict_of(release)
    assert code == 1
    assert "visual.static.onnx: differs from the golden embeddings by" in detail


def test_a_static_graph_with_weights_of_its_own_fails(release: Path) -> None:
    """Even if they are the right ones today: the next update would not change them."""

    def inline(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == "visual.ln_post.weight")
        onnx.external_data_helper.load_external_data_for_tensor(tensor, str(release))
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))

    edit(release / VISUAL.static_graph, inline)
    code, detail = verdict_of(release)
    assert code == 1
    assert "visual.ln_post.weight is not at the place that it has in visual.onnx" in detail


def test_a_static_graph_with_a_dynamic_input_fails(release: Path) -> None:
    def loosen(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"

    edit(release / VISUAL.static_graph, loosen)
    assert verdict_of(release) == (1, "visual.static.onnx: the shape of its input is not fixed")


def test_a_device_has_them_from_its_base_and_an_update_sends_none(lab: Lab, tmp_path: Path) -> None:
    store = tmp_path / "store"
    for command in (
        ("init", store, "--base", lab.release(0), "--trust", lab.public, "--health", "onnxruntime"),
        ("apply", store, lab.update),
    ):
        done = r1export("device", *command)
        assert done.returncode == 0, done.output
    for name in STATIC_GRAPHS:
        assert (store / "current" / name).read_bytes() == (lab.release(1) / name).read_bytes()
    code, _ = verdict_of((store / "current").resolve())
    assert code == 0
    _, manifest, _ = split(lab.update.read_bytes())
    assert {file.path for file in Manifest.parse(manifest).files if file.parts is None} >= {*STATIC_GRAPHS}
