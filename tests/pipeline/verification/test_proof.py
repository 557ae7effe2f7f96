"""The proof of a run whose experts stand beside q and v of the text tower alone: what the updates change is what is proven."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from running import RECIPE, SETTINGS, r1export

from r1export.errors import CheckFailed
from r1export.pipeline.context import NoProgress, RunContext
from r1export.pipeline.variant import Variant
from r1export.pipeline.verification.inputs import parity_inputs
from r1export.pipeline.verification.proof import ladder, touched_towers
from r1export.pipeline.verification.run import verify_run
from r1export.run_folder import RunFolder
from r1export.update.container import read_tensors, write_tensors
from r1export.update.factors import ExpertUpdate, Factors, Rows
from r1export.verify import proof

CLIMBED = ("optimized_graph", "executed_ops", "cost")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("proving")
    (folder / "recipe.toml").write_text(RECIPE)
    settings = (*SETTINGS, 'pool.towers=["textual"]', 'pool.targets=["q", "v"]')
    sets = [part for setting in settings for part in ("--set", setting)]
    for command in (("train", folder / "recipe.toml", "--out", folder / "run", *sets), ("export", folder / "run")):
        assert r1export(*command).returncode == 0
    return folder / "run"


@pytest.fixture
def form(run: Path) -> Variant:
    return Variant(RunContext(RunFolder(run), RunFolder(run).recipe(), "cpu", NoProgress()), "fp32")


@pytest.fixture(autouse=True)
def _short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed matters here, not how well."""
    monkeypatch.setattr("r1export.verify.latency.PATIENCE", 0.0)
    monkeypatch.setattr("r1export.verify.latency.BLOCKS", 3)


def climbed(variant: Variant, updates: list[ExpertUpdate] | None = None) -> dict:
    """The ladder of release 1, after that of the base."""
    seen, inputs = {}, parity_inputs(variant.context, variant.context.tasks[0])
    ladder(variant, 0, inputs, [], seen, ("cpu",))
    return ladder(variant, 1, inputs, updates or variant.context.run.updates(variant.context.recipe), seen, ("cpu",))


def test_a_run_that_learns_in_the_text_tower_alone_is_proven_and_timed_there(run: Path) -> None:
    done = r1export("verify", run)
    assert done.returncode in (0, 4), done.output
    release = json.loads((run / "report.json").read_text())["releases"][1]
    control = release["proof"]["control"]["unmerged"]
    assert (control["detected"], control["detail"].split(":")[0]) == (True, "textual tower")
    assert release["latency"]["tower"] == "textual"
    assert set(release["latency"]["providers"]["CPUExecutionProvider"]["1"]) >= {"routed_torch", "unmerged", "base"}


def test_a_release_by_itself_is_timed_in_the_tower_that_differs_from_the_base(run: Path) -> None:
    report = json.loads(r1export("verify", run / "releases" / "01-digits", "--json").stdout)
    assert report["latency"]["tower"] == "textual"


def test_a_control_that_cannot_be_run_leaves_the_rungs_as_they_were_measured(variant: Variant, monkeypatch) -> None:
    def refused(*_: object) -> None:
        raise CheckFailed("onnxruntime refuses the control")

    monkeypatch.setattr(proof, "proof_control", refused)
    found = climbed(variant)
    assert {found[rung]["verdict"] for rung in CLIMBED} == {"pass"}
    assert found["control"]["unmerged"]["detected"] is None
    assert "onnxruntime refuses the control" in found["control"]["unmerged"]["detail"]


def test_an_unmerged_model_that_no_runtime_takes_leaves_a_report_without_its_time(
    run: Path, variant, monkeypatch
) -> None:
    def spoiled(graph: Path, update: ExpertUpdate, out: Path) -> Path:
        out.write_bytes(b"no graph")
        return out

    monkeypatch.setattr("r1export.pipeline.verification.proof.add_branches", spoiled)
    release = verify_run(variant.context)["releases"][1]
    assert release["verdict"] == "inconclusive"
    assert release["proof"]["control"]["unmerged"]["detected"] is None
    assert release["latency"]["ratio"] > 0
    assert "unmerged" not in release["latency"]["providers"]["CPUExecutionProvider"]["1"]


def test_an_update_of_both_towers_has_to_be_told_apart_in_both(variant: Variant, monkeypatch) -> None:
    (learned,) = variant.context.run.updates(variant.context.recipe)
    name = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    u, v = (part[:, :1] for part in (variant.context.base[name] * 0.1, variant.context.base[name].T))
    both = ExpertUpdate({**learned.factors, Rows(name, 0, len(u)): Factors(u.copy(), v.T.copy())})
    assert touched_towers(variant, [both]) == ("visual", "textual")
    assert climbed(variant, [both])["control"]["unmerged"]["detected"] is True
    told = {"visual": True, "textual": False}
    monkeypatch.setattr(
        proof,
        "proof_control",
        lambda base, *_: {"unmerged": {"detected": told[base.stem], "detail": f"{base.stem} looked at"}},
    )
    control = climbed(variant, [both])["control"]["unmerged"]
    assert control == {
        "detected": False,
        "detail": "visual tower: visual looked at; textual tower: textual looked at",
    }


def test_a_base_that_cannot_be_run_leaves_the_rungs_inconclusive_and_nothing_is_timed(
    run: Path, tmp_path: Path
) -> None:
    """Its weights are cut short; the release beside it is sound."""
    copy = Path(shutil.copytree(run / "releases", tmp_path / "releases"))
    weights = copy / "00-base" / "textual.safetensors"
    tensors = read_tensors(weights)
    write_tensors(weights, {name: tensors[name] for name in list(tensors)[:1]})
    report = json.loads(r1export("verify", copy / "01-digits", "--json").stdout)
    assert report["verdict"] == "inconclusive"
    assert {report["proof"][rung]["verdict"] for rung in CLIMBED} == {"inconclusive"}
    assert "the base beside it cannot be run" in report["proof"]["cost"]["detail"]
    assert report.get("latency") is None
