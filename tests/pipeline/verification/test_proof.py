"""The proof of a run whose experts stand in q and v of the text tower alone: what the updates change is what is proven."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest
from running import QUICK, RECIPE, context_of, r1export, trained_run

from r1export.errors import Unsupported
from r1export.pipeline.variant import Variant
from r1export.pipeline.verification.graph_runs import graph_feeds, run_graphs
from r1export.pipeline.verification.inputs import parity_inputs
from r1export.pipeline.verification.proof import embedding_width, release_proof, touched_towers
from r1export.pipeline.verification.release import verify_release
from r1export.pipeline.verification.run import verify_run
from r1export.update.container import read_tensors, write_tensors
from r1export.update.factors import ExpertUpdate, Factors, Rows
from r1export.verify import proof
from r1export.verify.results import Check, Proof, ReleaseReport

RUN_RUNGS = ("optimized_graph", "executed_ops", "cost")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = ('pool.towers=["textual"]', 'pool.targets=["q", "v"]')
    return trained_run(tmp_path_factory.mktemp("proof"), RECIPE, *settings)


@pytest.fixture
def variant(run: Path) -> Variant:
    return Variant(context_of(run), "fp32")


def proof_of(variant: Variant, updates: list[ExpertUpdate] | None = None, number: int = 1) -> Proof:
    """The proof of a release against what the base runs."""
    ref = variant.release(number, updates or variant.context.run.updates(variant.context.recipe))
    inputs = parity_inputs(variant.context, variant.context.tasks[0])
    base = run_graphs(ref.base.path, graph_feeds(inputs, embedding_width(ref)), ("cpu",))
    return release_proof(ref, inputs, base, ("cpu",))


def verified(variant: Variant) -> ReleaseReport:
    return verify_run(variant.context, budget=QUICK).releases[1]


def test_a_run_that_learns_in_the_text_tower_alone_is_proven_and_timed_there(variant: Variant) -> None:
    release = verified(variant)
    assert (release.proof.control.verdict, release.proof.control.detail.split(":")[0]) == ("pass", "textual tower")
    assert release.latency.tower == "textual"
    assert set(release.latency.providers["CPUExecutionProvider"]["1"]) >= {"routed_torch", "unmerged", "base"}


def test_a_release_by_itself_is_timed_in_the_tower_that_differs_from_the_base(run: Path) -> None:
    assert verify_release(run / "releases" / "01-digits", budget=QUICK).latency.tower == "textual"


def test_the_base_release_is_compared_with_the_graphs_that_the_run_exported(variant: Variant) -> None:
    """Against itself it could not fail."""
    assert proof_of(variant, number=0).verdict == "pass"
    graph = variant.release(0).path / "visual.onnx"
    before = graph.read_bytes()
    try:
        model = onnx.load_from_string(before)
        model.doc_string = "edited"
        graph.write_bytes(model.SerializeToString())
        edited = proof_of(variant, number=0)
        model.graph.node[0].attribute.append(onnx.helper.make_attribute("extra", 1))
        graph.write_bytes(model.SerializeToString())
        restructured = proof_of(variant, number=0)
    finally:
        graph.write_bytes(before)
    assert (edited.same_file.verdict, edited.graph.verdict) == ("fail", "pass")
    assert "visual.onnx differs from the export's" in edited.same_file.detail
    assert restructured.graph.verdict == "fail"


def test_a_control_that_cannot_be_run_leaves_the_rungs_as_they_were_measured(variant: Variant, monkeypatch) -> None:
    def refused(*_: object) -> None:
        raise Unsupported("the control cannot be made")

    monkeypatch.setattr("r1export.pipeline.verification.proof.add_branches", refused)
    found = proof_of(variant)
    assert {getattr(found, rung).verdict for rung in RUN_RUNGS} == {"pass"}
    assert found.control.verdict == "inconclusive"
    assert "the control cannot be made" in found.control.detail


def test_an_unmerged_model_that_no_runtime_takes_leaves_a_report_without_its_time(
    variant: Variant, monkeypatch
) -> None:
    def spoiled(graph: Path, update: ExpertUpdate, out: Path) -> Path:
        out.write_bytes(b"no graph")
        return out

    monkeypatch.setattr("r1export.pipeline.verification.proof.add_branches", spoiled)
    release = verified(variant)
    assert release.verdict == "inconclusive"
    assert (release.proof.control.verdict, release.proof.control.looked_at) == ("inconclusive", 0)
    assert release.latency.ratio > 0
    assert "unmerged" not in release.latency.providers["CPUExecutionProvider"]["1"]


def test_an_update_of_both_towers_has_to_be_told_apart_in_both(variant: Variant, monkeypatch) -> None:
    (learned,) = variant.context.run.updates(variant.context.recipe)
    name = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    u, v = (part[:, :1] for part in (variant.context.base[name] * 0.1, variant.context.base[name].T))
    both = ExpertUpdate({**learned.factors, Rows(name, 0, len(u)): Factors(u.copy(), v.T.copy())})
    assert touched_towers(variant.release(1, [both]), [both]) == ("visual", "textual")
    told = proof_of(variant, [both]).control
    assert (told.verdict, told.looked_at, told.of) == ("pass", 2, 2)

    def blind_for_texts(base: Path, *_: object) -> Check:
        problems = ["blind"] if base.stem == "textual" else []
        return Check.judge(problems, looked_at=1, of=1, detail="told apart")

    monkeypatch.setattr(proof, "tell_apart", blind_for_texts)
    control = proof_of(variant, [both]).control
    assert (control.verdict, control.detail) == ("fail", "textual tower: blind")


def test_a_base_that_cannot_be_run_leaves_the_rungs_inconclusive_and_nothing_is_timed(
    run: Path, tmp_path: Path
) -> None:
    """Its weights are cut short; the release next to it is sound."""
    copy = Path(shutil.copytree(run / "releases", tmp_path / "releases"))
    weights = copy / "00-base" / "textual.safetensors"
    tensors = read_tensors(weights)
    write_tensors(weights, {name: tensors[name] for name in list(tensors)[:1]})
    report = json.loads(r1export("verify", copy / "01-digits", "--json").stdout)
    assert report["verdict"] == "inconclusive"
    assert {report["proof"][rung]["verdict"] for rung in RUN_RUNGS} == {"inconclusive"}
    assert "cannot run the base" in report["proof"]["cost"]["detail"]
    assert report["latency"]["ratio"] is None
