"""The compiled graph of OpenVINO as evidence: the same for other weights, another for another program, every time."""

import pytest
from onnx import helper
from verify.small import weights_of

from r1export.errors import CheckFailed
from r1export.update.factors import ExpertUpdate
from r1export.verify.proof import execute_graphs, prove
from r1export.verify.results import Check
from r1export.verify.runtimes.openvino_program import execute
from r1export.verify.unmerged_graph import add_branches


def verdicts(base, release, x) -> dict[str, str]:
    before, after = ({"visual.onnx": graph} for graph in (base, release))
    feeds = {"visual.onnx": x}
    executions = execute_graphs(before, feeds, ["openvino"])
    control = Check.not_applicable("tested in test_proof.py")
    proof = prove(before, after, executions, lambda: execute_graphs(after, feeds, ["openvino"]), control)
    return {name: str(getattr(proof, name).verdict) for name in ("optimized_graph", "executed_ops", "cost")}


def test_other_weights_make_the_same_program(write_graph, x) -> None:
    found = verdicts(write_graph("base"), write_graph("release", weights_of(7)), x)
    assert found == {"optimized_graph": "pass", "executed_ops": "pass", "cost": "pass"}


def test_an_operator_more_makes_another_program(write_graph, x) -> None:
    found = verdicts(
        write_graph("base"), write_graph("release", extra=(helper.make_node("Sin", ["normed"], ["embeds"]),)), x
    )
    assert (found["optimized_graph"], found["executed_ops"]) == ("fail", "fail")


def test_a_release_that_cannot_be_run_fails_the_rungs(write_graph, x) -> None:
    release = write_graph("release")
    (release.parent / "visual.safetensors").unlink()
    assert set(verdicts(write_graph("base"), release, x).values()) == {"fail"}
    with pytest.raises(CheckFailed, match="OpenVINO fails to run it"):
        execute(release, x)


def test_it_is_the_same_every_time_and_names_a_kernel_for_every_node(write_graph, x) -> None:
    graph = write_graph("base")
    found = execute(graph, x)
    assert found == execute(graph, x)
    assert found.count()["FullyConnected"] == 1
    assert all(kernel.provider for kernel in found.kernels)
    assert found.weight_bytes >= 4 * (36 + 6)
    assert found.flops is None


def test_kernels_have_the_shapes_of_the_run(write_graph, x) -> None:
    graph = write_graph("base")
    linear = next(kernel for kernel in execute(graph, x).kernels if kernel.op == "FullyConnected")
    assert [shape for _, shape in linear.outputs] == [(2, 6)]
    assert linear.inputs[0][1] == (2, 6)


def test_the_unmerged_model_is_another_program(write_graph, x, update: ExpertUpdate) -> None:
    base = write_graph("base")
    unmerged = add_branches(base, update, write_graph("unmerged").with_name("visual.onnx"))
    assert set(verdicts(base, unmerged, x).values()) == {"fail"}
