"""A graph is code: what asks for more memory than there is, or never ends, is a failed check and not the end of verify."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from running import r1export, trained_run

from r1export.pipeline.verification.release import verify_release
from r1export.update.release_manifest import ReleaseManifest
from r1export.verify import golden
from r1export.verify.golden import BATCHES, GoldenRuns
from r1export.verify.results import Verdict
from r1export.verify.trial import Limits, limits_for, try_graphs

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from faults.planting import Site, in_graph, seal_all


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from test_planted_faults import RECIPE

    return trained_run(tmp_path_factory.mktemp("trial"), RECIPE)


@pytest.fixture
def site(exported: Path, tmp_path: Path) -> Site:
    return Site(Path(shutil.copytree(exported, tmp_path / "run")))


def huge(graph: onnx.GraphProto) -> None:
    """256 GiB of zeros, of which one is added to the result."""
    shape = numpy_helper.from_array(np.array([1 << 36], np.int64), "huge_shape")
    graph.initializer.append(shape)
    _add_to_output(graph, [helper.make_node("ConstantOfShape", ["huge_shape"], ["huge"])], "huge")


def endless(graph: onnx.GraphProto) -> None:
    """A loop whose condition stays true."""
    false = numpy_helper.from_array(np.array(True), "go_on")
    zero = numpy_helper.from_array(np.zeros(1, np.float32), "start")
    body = helper.make_graph(
        [helper.make_node("Identity", ["in"], ["out"]), helper.make_node("Add", ["value_in", "one"], ["value_out"])],
        "body",
        [
            helper.make_tensor_value_info("number", TensorProto.INT64, []),
            helper.make_tensor_value_info("in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value_in", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value_out", TensorProto.FLOAT, [1]),
        ],
        [numpy_helper.from_array(np.ones(1, np.float32), "one")],
    )
    graph.initializer.extend([false, zero])
    _add_to_output(graph, [helper.make_node("Loop", ["", "go_on", "start"], ["ended"], body=body)], "ended")


def _add_to_output(graph: onnx.GraphProto, nodes: list[onnx.NodeProto], name: str) -> None:
    output = graph.output[0].name
    graph.node[-1].output[0] = "before"
    first = numpy_helper.from_array(np.array([0], np.int64), "first")
    graph.initializer.append(first)
    graph.node.extend([*nodes, helper.make_node("Gather", [name, "first"], ["one_value"])])
    graph.node.append(helper.make_node("Add", ["before", "one_value"], [output]))


def test_a_graph_that_asks_for_more_memory_than_there_is_is_a_failed_check(site: Site) -> None:
    in_graph("visual.onnx", huge, every=False)(site)
    seal_all(site)
    done = r1export("verify", "--no-latency", site.release)
    assert done.returncode == 1, done.output
    assert "Graphs: failed." in done.output


def test_a_graph_that_never_ends_is_a_failed_check(site: Site) -> None:
    in_graph("visual.onnx", endless, every=False)(site)
    seal_all(site)
    shutil.rmtree(site.base)
    report = verify_release(site.release, budget=None, limits=Limits(nbytes=16 << 30, seconds=15))
    assert report.verdict is Verdict.FAIL
    assert report.contents.graphs.detail == "the graphs did not finish within 15 s"


def test_the_golden_samples_are_run_once_in_the_child(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release, runs = exported / "releases" / "00-base", GoldenRuns()
    tasks = [task.name for task in ReleaseManifest.read(release).tasks]
    expected, classified = GoldenRuns().of(release, "cpu"), GoldenRuns().classified(release, tasks)
    for name in ("run_in_batches", "open_session"):
        monkeypatch.setattr(golden, name, lambda *_: pytest.fail("run again in this process"))
    assert try_graphs(release, limits_for(release), runs) == ""
    found = runs.of(release, "cpu")
    assert [config.batch for config in found] == list(BATCHES)
    for config, embeds in expected.items():
        assert np.array_equal(found[config].visual, embeds.visual)
        assert np.array_equal(found[config].textual, embeds.textual)
    assert np.array_equal(runs.classified(release, tasks).embeds, classified.embeds)
    for task, logits in classified.logits.items():
        assert np.array_equal(runs.classified(release, tasks).logits[task], logits)


def test_outputs_that_lack_a_batch_size_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "outputs.npz", **{"1.visual": np.zeros((2, 3)), "1.textual": np.zeros((2, 3))})
    with pytest.raises(KeyError, match=r"2\.visual"):
        GoldenRuns().load(tmp_path / "outputs.npz", tmp_path)
