"""The ladder on real graphs in the real onnxruntime: what is the same passes, what is not is told apart."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from verify.small import weights_of

from r1export.errors import CheckFailed, InputError, Unsupported
from r1export.update.factors import ExpertUpdate, Factors, Rows
from r1export.verify.proof import Executions, execute_graphs, joined_controls, prove, tell_apart
from r1export.verify.results import Check, Proof
from r1export.verify.runtimes.ort_profile import Execution, Kernel, execute
from r1export.verify.runtimes.runtime import job, open_session, runner
from r1export.verify.unmerged_graph import add_branches

CAST = (helper.make_node("Cast", ["normed"], ["half"], to=10), helper.make_node("Cast", ["half"], ["embeds"], to=1))


NO_CONTROL = Check.not_applicable("tested apart")


def proven(base: Path, release: Path, x: dict) -> Proof:
    before, after = ({"visual.onnx": path} for path in (base, release))
    feeds = {"visual.onnx": x}
    executions = execute_graphs(before, feeds, ["cpu"])
    return prove(before, after, executions, lambda: execute_graphs(after, feeds, ["cpu"]), NO_CONTROL)


def verdicts(proof: Proof) -> list[str]:
    return [
        str(rung.verdict)
        for rung in (proof.same_file, proof.graph, proof.optimized_graph, proof.executed_ops, proof.cost)
    ]


def test_other_weights_in_the_same_graph_climb_the_whole_ladder(write_graph, x) -> None:
    assert verdicts(proven(write_graph("base"), write_graph("release", weights_of(7)), x)) == ["pass"] * 5


def test_an_extra_cast_fails_every_rung_it_touches_and_is_named(write_graph, x) -> None:
    proof = proven(write_graph("base"), write_graph("release", extra=CAST), x)
    assert verdicts(proof)[:4] == ["fail"] * 4
    assert "+2 Cast" in proof.executed_ops.detail


def test_an_extra_identity_fails_the_first_rungs_though_the_optimizer_takes_it_out(write_graph, x) -> None:
    identity = (helper.make_node("Identity", ["normed"], ["embeds"]),)
    assert verdicts(proven(write_graph("base"), write_graph("release", extra=identity), x))[:3] == [
        "fail",
        "fail",
        "pass",
    ]


def test_a_release_that_cannot_be_run_fails_the_rungs_and_is_no_crash(write_graph, x) -> None:
    release = write_graph("release")
    (release.parent / "visual.safetensors").unlink()
    assert verdicts(proven(write_graph("base"), release, x)) == ["pass", "pass", "fail", "fail", "fail"]


def test_a_base_that_cannot_be_run_decides_nothing(write_graph, x) -> None:
    base = write_graph("base")
    (base.parent / "visual.safetensors").unlink()
    proof = proven(base, write_graph("release"), x)
    assert verdicts(proof) == ["pass", "pass", "inconclusive", "inconclusive", "inconclusive"]
    assert "cannot run the base" in proof.cost.detail


def test_a_missing_graph_and_one_that_is_no_graph_fail(write_graph, tmp_path, x) -> None:
    base, other = write_graph("base"), tmp_path / "none.onnx"
    assert verdicts(proven(base, other, x))[:2] == ["fail", "fail"]
    other.write_bytes(b"no graph")
    assert verdicts(proven(base, other, x))[1] == "fail"


def test_two_graphs_that_are_both_missing_are_not_the_same(tmp_path, x) -> None:
    assert verdicts(proven(tmp_path / "none.onnx", tmp_path / "none.onnx", x))[0] == "fail"


def test_a_proof_about_no_graph_does_not_pass() -> None:
    proof = prove({}, {}, Executions({}), lambda: Executions({}), NO_CONTROL)
    assert set(verdicts(proof)) == {"inconclusive"}


def test_the_peak_of_memory_and_all_digests_are_the_same_every_time(write_graph, x) -> None:
    graph = write_graph("base")
    assert execute(graph, x) == execute(graph, x)


def costing(flops: int | None, weight_bytes: int, peak: int | None) -> Executions:
    return Executions({"visual.onnx on cpu": Execution("d", 1, (), weight_bytes, peak, flops)})


def cost(base: Executions, release: Executions):
    return prove({}, {}, base, lambda: release, NO_CONTROL).cost


def test_the_digest_of_the_cost_is_of_arithmetic_and_weights_and_leaves_the_peak_out() -> None:
    base = costing(100, 50, 1000)
    same = cost(base, costing(100, 50, 1005))
    assert (same.verdict, same.digest) == ("pass", same.expected)
    assert len(same.digest) == 64
    for other in (costing(101, 50, 1000), costing(100, 51, 1000)):
        rung = cost(base, other)
        assert (rung.verdict, rung.expected) == ("fail", same.expected)
        assert rung.digest != rung.expected
    heavier = cost(base, costing(100, 50, 1100))
    assert (heavier.verdict, heavier.digest) == ("fail", heavier.expected)


def test_a_peak_that_the_profile_does_not_tell_is_said_to_be_unknown() -> None:
    unknown = costing(None, 50, None)
    assert cost(unknown, unknown).detail == "visual.onnx on cpu: 0.0 MB of weights, peak memory unknown"


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
    quantized = [(2, 3, 32, 32), (), (), (128, 3, 8, 8), (128,), (), (), ()]
    assert kernel("QLinearConv", quantized, (2, 128, 4, 4)) == 2 * 2 * 128 * 16 * 3 * 64
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
    check = tell_apart(base, unmerged, x)
    assert (check.verdict, check.looked_at) == ("pass", 1)
    assert "L1, L2, L3" in check.detail


def test_a_control_without_branches_is_not_told_apart(write_graph, x) -> None:
    check = tell_apart(write_graph("base"), write_graph("same", weights_of(3)), x)
    assert check.verdict == "fail"
    assert "did not detect the unmerged model" in check.detail


def test_a_control_that_cannot_be_run_gives_no_answer(write_graph, x) -> None:
    unmerged = write_graph("unmerged")
    (unmerged.parent / "visual.safetensors").unlink()
    check = tell_apart(write_graph("base"), unmerged, x)
    assert (check.verdict, check.looked_at, check.of) == ("inconclusive", 0, 1)


def test_controls_of_two_towers_have_to_be_told_apart_in_both() -> None:
    told = Check.judge([], looked_at=1, of=1, detail="told apart")
    blind = Check.judge(["blind"], looked_at=1, of=1, detail="")
    silent = Check.unmeasured("no answer", of=1)
    assert joined_controls({"visual": told, "textual": told}).verdict == "pass"
    assert joined_controls({"visual": told, "textual": blind}).verdict == "fail"
    assert joined_controls({"visual": told, "textual": silent}).verdict == "inconclusive"
    assert joined_controls({}).verdict == "inconclusive"


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
    assert tell_apart(base, unmerged, x).verdict == "pass"


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
    with pytest.raises(Unsupported, match="no layer that the update changes"):
        add_branches(write_graph("base"), other, tmp_path / "out.onnx")


def test_a_provider_that_is_not_here_is_refused_and_never_replaced_by_another(write_graph) -> None:
    graph = write_graph("base")
    with pytest.raises(InputError, match="unknown provider 'gpu'"):
        open_session(graph, provider="gpu")
    with pytest.raises(Unsupported, match="onnxruntime"):
        open_session(graph, provider="tensorrt")


def test_inputs_that_the_graph_does_not_take_are_a_failed_check(write_graph) -> None:
    run = runner(open_session(write_graph("baked", batch=1)))
    with pytest.raises(CheckFailed, match=r"fails to run x \[2, 6\]"):
        run({"x": np.zeros((2, 6), np.float32)})


def test_a_graph_that_is_none_is_a_failed_check(tmp_path) -> None:
    (tmp_path / "g.onnx").write_bytes(b"\x00\x01")
    with pytest.raises(CheckFailed, match="onnxruntime rejects the model"):
        open_session(tmp_path / "g.onnx")


def test_a_job_runs_the_session_on_fixed_inputs(write_graph, x) -> None:
    graph = write_graph("base")
    assert np.array_equal(job(open_session(graph), x, "cpu")()[0], runner(open_session(graph))(x))


def test_optimised_nodes_are_counted_from_the_graph_that_runs(write_graph, x) -> None:
    assert execute(write_graph("base"), x).optimized_nodes <= len(
        onnx.load(write_graph("again"), load_external_data=False).graph.node
    )
