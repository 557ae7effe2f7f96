"""The first diverging node is found, and the case that is left behind shows it alone."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from r1export.errors import CheckFailed
from r1export.verify.locate import Boundary, locate
from r1export.verify.runtimes.runtime import open_session, runner


def torch_side(x: np.ndarray, weights: dict[str, np.ndarray]) -> tuple[list[Boundary], np.ndarray]:
    """What torch would have at the linear, and at the output of the whole."""
    fc = x @ weights["fc.weight"].T + weights["fc.bias"]
    act = np.maximum(fc, 0)
    normed = (act - act.mean(-1, keepdims=True)) / np.sqrt(act.var(-1, keepdims=True) + 1e-5)
    return [Boundary("fc", "in", x), Boundary("fc", "out", fc)], normed


def weights_of(graph) -> dict[str, np.ndarray]:
    from r1export.update.container import read_tensors

    return read_tensors(graph.parent / "visual.safetensors")


def test_a_graph_that_agrees_diverges_nowhere(write_graph, x, tmp_path) -> None:
    graph = write_graph("right")
    boundaries, expected = torch_side(x["x"], weights_of(graph))
    assert locate(graph, x, boundaries, expected, tmp_path / "case") is None
    assert not (tmp_path / "case").exists()


def test_a_wrong_weight_is_located_at_the_linear_that_holds_it(write_graph, x) -> None:
    graph = write_graph("right")
    boundaries, expected = torch_side(x["x"], weights_of(graph))
    wrong = weights_of(graph)
    wrong["fc.weight"][1, 2] += 1e-2
    found = locate(write_graph("wrong", wrong), x, boundaries, expected)
    assert (found.nodes, found.parameters) == ((("node_fc", "Gemm"),), ("fc.weight", "fc.bias"))
    assert found.before == 0
    assert found.error > 1e-4
    assert "first diverging node: Gemm node_fc at the output of fc, parameters fc.weight, fc.bias" in str(found)


def test_a_wrong_epsilon_is_located_after_the_linear_and_reproduced(write_graph, x, tmp_path) -> None:
    wrong = write_graph("wrong", epsilon=0.1)
    boundaries, expected = torch_side(x["x"], weights_of(wrong))
    found = locate(wrong, x, boundaries, expected, tmp_path / "case")
    assert [op for _, op in found.nodes] == ["Relu", "LayerNormalization"]
    assert "or the 1 nodes before it, from node_relu on" in str(found)
    done = subprocess.run(
        [sys.executable, "reproduce.py"], cwd=tmp_path / "case", capture_output=True, text=True, timeout=60
    )
    shown = float(done.stdout.removeprefix("max abs difference "))
    assert shown == pytest.approx(np.abs(runner(open_session(wrong))(x) - expected).max(), rel=1e-3)


def test_a_graph_with_nan_diverges_where_it_begins(write_graph, x) -> None:
    wrong = weights_of(write_graph("right"))
    boundaries, expected = torch_side(x["x"], wrong)
    wrong["fc.bias"][0] = np.nan
    found = locate(write_graph("wrong", wrong), x, boundaries, expected)
    assert found.nodes[-1][0] == "node_fc"
    assert found.error == float("inf")


def test_boundaries_that_the_graph_does_not_have_or_that_have_another_size_are_passed_over(write_graph, x) -> None:
    graph = write_graph("right")
    boundaries, expected = torch_side(x["x"], weights_of(graph))
    others = [Boundary("elsewhere", "out", x["x"]), Boundary("fc", "out", x["x"][:1])]
    assert locate(graph, x, [*others, *boundaries[:1]], expected) is None


def test_a_graph_that_cannot_be_run_is_a_failed_check(write_graph, x) -> None:
    graph = write_graph("baked", batch=1, extra=(helper.make_node("Identity", ["normed"], ["embeds"]),))
    boundaries, expected = torch_side(x["x"], weights_of(graph))
    with pytest.raises(CheckFailed, match="cannot compute the graph's intermediate values"):
        locate(graph, x, boundaries, expected)


def test_a_case_in_half_precision_runs_too(tmp_path) -> None:
    weight, x = np.eye(3, dtype=np.float16), np.array([[1, 2, 3]], np.float32)
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["half", "fc.weight"], ["product"], "node_fc"),
        helper.make_node("Cast", ["product"], ["embeds"], to=TensorProto.FLOAT),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3]) for name in ("x", "embeds")]
    graph = helper.make_graph(nodes, "half", ends[:1], ends[1:], [numpy_helper.from_array(weight, "fc.weight")])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), tmp_path / "half.onnx"
    )
    boundaries = [Boundary("fc", "in", x), Boundary("fc", "out", 2 * x)]
    found = locate(tmp_path / "half.onnx", {"x": x}, boundaries, 2 * x, tmp_path / "case", "fp16")
    assert found.nodes == (("node_fc", "MatMul"),)
    done = subprocess.run(
        [sys.executable, "reproduce.py"], cwd=tmp_path / "case", capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "max abs difference 3.0", done.stderr
