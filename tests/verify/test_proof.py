"""The ladder on real graphs in the real onnxruntime: what is the same passes, what is not is told apart."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from verify.small import weights_of

from r1export.errors import CheckFailed, InputError, Unsupported
from r1export.update.factors import ExpertUpdate, Factors, Rows
from r1export.verify.ort_profile import Execution, Kernel, execute
from r1export.verify.proof import executions, proof_control, rungs, same_files, same_graphs
from r1export.verify.runtime import job, open_session, provider_options, runner, weights_digest
from r1export.verify.unmerged_graph import add_branches

CAST = (helper.make_node("Cast", ["normed"], ["half"], to=10), helper.make_node("Cast", ["half"], ["embeds"], to=1))


def climbed(base: Path, release: Path, x: dict) -> dict[str, str]:
    graphs = [{"visual.onnx": path} for path in (base, release)]
    found = {"same_file": same_files(*graphs), "graph": same_graphs(*graphs)}
    found |= rungs(
        executions(graphs[0], {"visual.onnx": x}, ["cpu"]), lambda: executions(graphs[1], {"visual.onnx": x}, ["cpu"])
    )
    json.dumps(found, allow_nan=False)
    return {name: rung["verdict"] for name, rung in found.items()} | {"detail": found["executed_ops"]["detail"]}


def test_other_weights_in_the_same_graph_climb_the_whole_ladder(write_graph, x) -> None:
    found = climbed(write_graph("base"), write_graph("release", weights_of(7)), x)
    assert {found[rung] for rung in ("same_file", "graph", "optimized_graph", "executed_ops", "cost")} == {"pass"}


def test_an_extra_cast_fails_every_rung_it_touches_and_is_named(write_graph, x) -> None:
    found = climbed(write_graph("base"), write_graph("release", extra=CAST), x)
    assert {found[rung] for rung in ("same_file", "graph", "optimized_graph", "executed_ops")} == {"fail"}
    assert "+2 Cast" in found["detail"]


def test_an_extra_identity_fails_the_first_rungs_though_the_optimiser_takes_it_out(write_graph, x) -> None:
    found = climbed(
        write_graph("base"), write_graph("release", extra=(helper.make_node("Identity", ["normed"], ["embeds"]),)), x
    )
    assert (found["same_file"], found["graph"], found["optimized_graph"]) == ("fail", "fail", "pass")


def test_a_release_that_cannot_be_run_fails_the_rungs_and_is_no_crash(write_graph, x) -> None:
    release = write_graph("release")
    (release.parent / "visual.safetensors").unlink()
    found = climbed(write_graph("base"), release, x)
    assert (found["same_file"], found["executed_ops"], found["cost"]) == ("pass", "fail", "fail")


def test_a_missing_graph_and_one_that_is_no_graph_fail(write_graph, tmp_path) -> None:
    base, other = {"visual.onnx": write_graph("base")}, {"visual.onnx": tmp_path / "none.onnx"}
    assert same_files(base, other)["verdict"] == same_graphs(base, other)["verdict"] == "fail"
    other["visual.onnx"].write_bytes(b"no graph")
    assert same_graphs(base, other)["verdict"] == "fail"


def test_the_peak_of_memory_and_all_digests_are_the_same_every_time(write_graph, x) -> None:
    graph = write_graph("base")
    assert execute(graph, x) == execute(graph, x)


def costing(flops: int | None, weight_bytes: int, peak: int | None) -> dict[str, Execution]:
    return {"visual.onnx on cpu": Execution("d", 1, (), weight_bytes, peak, flops)}


def test_the_digest_of_the_cost_is_of_arithmetic_and_weights_and_leaves_the_peak_out() -> None:
    base = costing(100, 50, 1000)
    same = rungs(base, lambda: costing(100, 50, 1005))["cost"]
    assert (same["verdict"], same["digest"]) == ("pass", same["expected"])
    assert len(same["digest"]) == 64
    for other in (costing(101, 50, 1000), costing(100, 51, 1000)):
        found = rungs(base, lambda other=other: other)["cost"]
        assert (found["verdict"], found["expected"]) == ("fail", same["expected"])
        assert found["digest"] != found["expected"]
    heavier = rungs(base, lambda: costing(100, 50, 1100))["cost"]
    assert (heavier["verdict"], heavier["digest"]) == ("fail", heavier["expected"])


def test_a_peak_that_the_profile_does_not_tell_is_said_to_be_missing() -> None:
    untold = costing(None, 50, None)
    assert rungs(untold, lambda: untold)["cost"]["detail"] == "visual.onnx on cpu: 50 B of weights, peak not told"


def test_flops_follow_from_shapes() -> None:
    def kernel(op: str, inputs: list[tuple[int, ...]], output: tuple[int, ...]) -> int:
        return Kernel(
            op, "CPUExecutionProvider", tuple(("float", shape) for shape in inputs), (("float", output),)
        ).flops

    assert kernel("MatMul", [(2, 17, 128), (128, 384)], (2, 17, 384)) == 2 * 2 * 17 * 128 * 384
    assert (
        kernel("MatMul", [(2, 17, 128)], (2, 17, 384)) == 2 * 2 * 17 * 128 * 384
    )  # packed when the session was opened
    assert kernel("Gemm", [(34, 128), (384, 128), (384,)], (34, 384)) == 2 * 34 * 128 * 384
    assert kernel("Gemm", [(34, 128), (384,)], (34, 384)) == 2 * 34 * 128 * 384  # packed, with its bias
    assert kernel("FusedMatMul", [(3, 5, 7), (3, 5, 11)], (3, 7, 11)) == 2 * 3 * 7 * 5 * 11
    assert kernel("Conv", [(2, 3, 32, 32), (128, 3, 8, 8)], (2, 128, 4, 4)) == 2 * 2 * 128 * 16 * 3 * 64
    assert (
        kernel("Attention", [(2, 4, 17, 32), (2, 4, 17, 32), (2, 4, 17, 32)], (2, 4, 17, 32))
        == 4 * 2 * 4 * 17 * 32 * 17
    )
    assert kernel("Add", [(2, 3), (2, 3)], (2, 3)) == 6
    assert kernel("Reshape", [(2, 3), (1,)], (6,)) == 0


def test_nothing_is_left_behind_by_profiling(write_graph, x, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    graph = write_graph("base")
    before = sorted(tmp_path.rglob("*"))
    execute(graph, x)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_unmerged_control_is_told_apart_by_every_rung(write_graph, x, update: ExpertUpdate, tmp_path) -> None:
    base = write_graph("base")
    unmerged = add_branches(base, update, write_graph("unmerged").with_name("visual.onnx"))
    found = proof_control(base, unmerged, x)["unmerged"]
    assert found["detected"] is True
    assert "L1, L2, L3" in found["detail"]


def test_a_control_without_branches_is_not_told_apart(write_graph, x) -> None:
    found = proof_control(write_graph("base"), write_graph("same", weights_of(3)), x)["unmerged"]
    assert found["detected"] is False
    assert "cannot tell the unmerged model from the base" in found["detail"]


def test_the_control_with_its_branches_computes_what_the_merged_model_computes(
    write_graph, x, update: ExpertUpdate
) -> None:
    base = write_graph("base")
    merged = write_graph("merged", weights_of() | update.apply(weights_of()))
    unmerged = add_branches(base, update, write_graph("unmerged").with_name("visual.onnx"))
    one, other = (runner(open_session(path))(x) for path in (merged, unmerged))
    assert np.abs(one - other).max() < 1e-5  # float32 rounding of values of order one through a norm
    assert np.abs(one - runner(open_session(base))(x)).max() > 1e-2


ROWS_OF = {"q": (0, 2), "k": (2, 4), "v": (4, 6)}  # of a weight of six rows


@pytest.mark.parametrize("turned", [False, True], ids=["Gemm", "MatMul"])
@pytest.mark.parametrize("targets", ["q", "k", "v", "qk", "qv", "kv", "qkv"])
def test_experts_beside_any_of_q_k_and_v_make_a_control(write_graph, x, targets: str, turned: bool) -> None:
    rng = np.random.default_rng(3)
    update = ExpertUpdate(
        {
            Rows("fc.weight", *ROWS_OF[target]): Factors(
                rng.normal(size=(2, 3)).astype(np.float32), rng.normal(size=(3, 6)).astype(np.float32)
            )
            for target in targets
        }
    )
    merged = weights_of() | update.apply(weights_of())
    if turned:
        merged["fc.weight"] = np.ascontiguousarray(merged["fc.weight"].T)
    stored = weights_of()
    stored["fc.weight"] = np.ascontiguousarray(stored["fc.weight"].T) if turned else stored["fc.weight"]
    expected = write_graph("merged", merged, turned=turned)
    base = write_graph("base", stored, turned=turned)
    unmerged = add_branches(base, update, write_graph("unmerged", stored, turned=turned))
    one, other, untouched = (runner(open_session(path))(x) for path in (expected, unmerged, base))
    assert np.abs(one - other).max() < 1e-5  # float32 rounding of values of order one through a norm
    assert np.abs(one - untouched).max() > 1e-2
    assert proof_control(base, unmerged, x)["unmerged"]["detected"] is True


def test_complete_branches_are_joined_without_padding(write_graph) -> None:
    update = ExpertUpdate(
        {
            Rows("fc.weight", *rows): Factors(np.ones((2, 3), np.float32), np.ones((3, 6), np.float32))
            for rows in ROWS_OF.values()
        }
    )
    graph = onnx.load(add_branches(write_graph("base"), update, write_graph("unmerged"))).graph
    sizes = [list(tensor.dims) for tensor in graph.initializer if ".u.weight" in tensor.name]
    assert sizes == [[3, 2]] * 3


def test_a_control_for_a_graph_that_the_update_does_not_touch_is_refused(
    write_graph, update: ExpertUpdate, tmp_path
) -> None:
    other = ExpertUpdate(
        {type(rows)("elsewhere.weight", rows.start, rows.stop): pair for rows, pair in update.factors.items()}
    )
    with pytest.raises(Unsupported, match="no linear that the update changes"):
        add_branches(write_graph("base"), other, tmp_path / "out.onnx")


def test_a_provider_that_is_not_here_is_refused_and_never_replaced_by_another(write_graph) -> None:
    graph = write_graph("base")
    with pytest.raises(InputError, match="no provider 'gpu'"):
        open_session(graph, provider="gpu")
    with pytest.raises(Unsupported, match="onnxruntime"):
        open_session(graph, provider="tensorrt")


def test_inputs_that_the_graph_does_not_take_are_a_failed_check(write_graph) -> None:
    run = runner(open_session(write_graph("baked", batch=1)))
    with pytest.raises(CheckFailed, match=r"cannot run x \[2, 6\]"):
        run({"x": np.zeros((2, 6), np.float32)})


def test_a_graph_that_is_none_is_a_failed_check(tmp_path) -> None:
    (tmp_path / "g.onnx").write_bytes(b"\x00\x01")
    with pytest.raises(CheckFailed, match="onnxruntime refuses the model"):
        open_session(tmp_path / "g.onnx")


def test_engine_caches_have_a_folder_for_each_digest_of_weights(tmp_path) -> None:
    one, other = (
        provider_options("tensorrt", weights_digest({"visual.safetensors": sha}), tmp_path)
        for sha in ("a" * 64, "b" * 64)
    )
    assert one["trt_engine_cache_path"] != other["trt_engine_cache_path"]
    assert provider_options("tensorrt", "", None) == provider_options("cpu", "", tmp_path) == {}
    assert provider_options("cuda", "", None) == {"use_tf32": "0"}


@pytest.mark.parametrize("provider", ["cpu", "tensorrt", "openvino"])
def test_a_cache_without_the_digest_of_the_weights_is_refused(write_graph, tmp_path, provider: str) -> None:
    with pytest.raises(ValueError, match="weights_digest"):
        open_session(write_graph("base"), provider=provider, cache=tmp_path)


def test_a_job_runs_the_session_on_fixed_inputs(write_graph, x) -> None:
    graph = write_graph("base")
    assert np.array_equal(job(open_session(graph), x, "cpu")()[0], runner(open_session(graph))(x))


def test_optimised_nodes_are_counted_from_the_graph_that_runs(write_graph, x) -> None:
    assert execute(write_graph("base"), x).optimized_nodes <= len(
        onnx.load(write_graph("again"), load_external_data=False).graph.node
    )
