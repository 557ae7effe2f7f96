"""`bundle` signs what was verified and nothing else: by the real command line, with the reports that make it refuse."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from running import context_of, r1export, reseal

from r1export.device.health import check_health
from r1export.device.version import Version
from r1export.errors import Unsupported
from r1export.pipeline import bundle
from r1export.pipeline.context import NoProgress, RunContext
from r1export.pipeline.variant import Variant
from r1export.pipeline.verification.without_task import check_without_tasks
from r1export.recipe_file import load_recipe
from r1export.run_folder import RunFolder
from r1export.update.atomic_io import sha256_file
from r1export.update.bundle import split
from r1export.update.container import read_tensors, write_tensors
from r1export.update.manifest import Health, Manifest
from r1export.update.release_manifest import GoldenGate, Release, ReleaseManifest
from r1export.verify.parity import GATES
from r1export.verify.results import Verdict


@pytest.fixture
def run(verified: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(verified, tmp_path / "run"))


@pytest.fixture
def order(verified: Path, tmp_path: Path):
    """Runs `bundle` for the first release; a refused one writes nothing."""

    def run_bundle(run: Path, *options: object, release: int = 1):
        out = tmp_path / "update.r1u"
        key = ("--key", verified.parent / "fleet.key")
        done = r1export("bundle", run, "--release", release, *key, "-o", out, "--json", *options)
        assert out.exists() == (done.returncode == 0)
        return done

    return run_bundle


def report_of(run: Path, number: int = 1) -> Path:
    return next((run / "releases").glob(f"{number:02d}-*")) / "report.json"


def edit(path: Path, verdict: str, **checks: str) -> None:
    """Give a report this verdict, and these verdicts to checks of its contents."""
    document = json.loads(path.read_bytes())
    for name, value in checks.items():
        counts = {"looked_at": 0, "of": 0} if value == "not_applicable" else {}
        document["contents"][name] |= {"verdict": value, "detail": f"{name} was edited", **counts}
    path.write_text(json.dumps(document | {"verdict": verdict}))


def signed(tmp_path: Path) -> Manifest:
    return Manifest.parse(split((tmp_path / "update.r1u").read_bytes())[1])


@pytest.mark.parametrize("release", [0, 1, 2])
def test_a_verified_release_is_signed_together_with_the_digest_of_its_report(
    verified, order, tmp_path, release
) -> None:
    done = order(verified, "--seq", 9, "--since", 2, release=release)
    assert done.returncode == 0, done.output
    assert json.loads(done.stdout)["accepted"] == []
    assert signed(tmp_path).evidence["report.json"] == sha256_file(report_of(verified, release))


def test_what_a_device_would_refuse_is_not_signed(verified, order, monkeypatch) -> None:
    """Limits that no machine keeps: the device's own health check runs before anything is signed."""
    monkeypatch.setattr(bundle, "_strict_limits", lambda manifest: GoldenGate(1e-12, 1.0))
    done = order(verified)
    assert done.returncode == 1, done.output
    assert "devices would reject 01-" in done.stderr
    assert "health check of visual.onnx: max. difference" in done.stderr


def test_what_another_processor_may_refuse_is_not_signed(verified, order, monkeypatch) -> None:
    """Just within the limits on this machine is no room for one that rounds otherwise."""
    release = Release.read(report_of(verified).parent)
    errors = [result.max_abs for result in check_health(Version(release.path, release, True), Health(1.0, -1.0, 0.0))]
    for factor, code in ((1.2, 1), (1.6, 0)):
        monkeypatch.setattr(
            bundle, "_strict_limits", lambda manifest, factor=factor: GoldenGate(factor * max(errors), 0.999)
        )
        assert order(verified).returncode == code


def test_a_release_without_a_report_is_refused(run, order) -> None:
    report_of(run).unlink()
    done = order(run)
    assert done.returncode == 1, done.output
    assert f"verify it first: r1export verify {run}" in done.stderr


def test_a_report_that_is_none_is_bad_input(run, order) -> None:
    for text in ("{}", "[", '{"schema": "r1export.report/1"}'):
        report_of(run).write_text(text)
        done = order(run)
        assert (done.returncode, "not a report of the format" in done.stderr) == (2, True), done.output


@pytest.mark.parametrize("other", ["releases/02-arrows/report.json", "report.json"])
def test_the_report_of_something_else_is_refused(run, order, other) -> None:
    shutil.copy(run / other, report_of(run))
    done = order(run)
    assert done.returncode == 1, done.output
    assert "is the report of another release" in done.stderr


def test_a_release_that_changed_after_it_was_verified_is_refused(run, order) -> None:
    release = report_of(run).parent
    (release / "tokenizer/merges.txt").write_text("changed")
    done = order(run)
    assert done.returncode == 1, done.output
    assert "tokenizer/merges.txt was modified" in done.stderr
    assert f"r1export verify {run}" in done.stderr
    reseal(release)
    done = order(run)
    assert (done.returncode, "is the report of another release" in done.stderr) == (1, True), done.output


def test_a_release_that_failed_is_refused_whatever_is_accepted(run, order) -> None:
    edit(report_of(run), "fail", card="fail", golden="inconclusive")
    for options in ((), ("--accept-inconclusive",)):
        done = order(run, *options)
        assert done.returncode == 1, done.output
        assert "Model card: failed. card was edited" in done.stderr


def test_an_inconclusive_release_is_signed_only_where_that_is_accepted(run, order) -> None:
    edit(report_of(run), "inconclusive", golden="inconclusive")
    reason = "Golden samples: inconclusive. golden was edited"
    done = order(run)
    assert (done.returncode, reason in done.stderr) == (4, True), done.output
    done = order(run, "--accept-inconclusive")
    assert done.returncode == 0, done.output
    assert json.loads(done.stdout)["accepted"] == [reason]


def test_a_verification_of_the_release_alone_is_not_enough(run, order) -> None:
    edit(report_of(run), "pass", weights="not_applicable")
    done = order(run)
    assert (done.returncode, "of the release alone" in done.stderr) == (1, True), done.output
    edit(report_of(run, 0), "pass", weights="not_applicable")
    assert order(run, "--seq", 9, release=0).returncode == 0  # nothing was merged into the base


@pytest.mark.parametrize(("stated", "limits"), [((10.0, -1.0), (5e-5, 1 - 1e-6)), ((1e-5, 1 - 1e-9), (1e-5, 1 - 1e-9))])
def test_the_signed_limits_are_no_laxer_than_ours(run, order, tmp_path, stated, limits) -> None:
    report = report_of(run)
    replace(ReleaseManifest.read(report.parent), golden=GoldenGate(*stated)).sealed().write(report.parent)
    document = json.loads(report.read_bytes())
    document["release"]["manifest_sha256"] = sha256_file(report.parent / "manifest.json")
    report.write_text(json.dumps(document))
    assert order(run).returncode == 0
    assert signed(tmp_path).health == Health(*limits, 0.9)


def test_nothing_is_signed_on_a_machine_that_adds_otherwise(verified, order, monkeypatch) -> None:
    def fails() -> None:
        raise Unsupported("arithmetic self-test 1: 2.0, expected 1.0")

    monkeypatch.setattr(bundle, "known_answers_hold_in_fresh_process", fails)
    done = order(verified)
    assert (done.returncode, "arithmetic self-test 1" in done.stderr) == (3, True), done.output


def test_a_version_without_a_task_is_verified_before_it_is_signed(verified, order, monkeypatch) -> None:
    options = ("--drop", "digits", "--seq", 9)
    done = order(verified, *options, release=2)
    assert done.returncode == 0, done.output
    Path(json.loads(done.stdout)["bundle"]).unlink()
    monkeypatch.setattr(bundle, "_refresh", lambda context, step, folder: None)  # stale outputs
    done = order(verified, *options, release=2)
    assert done.returncode == 1, done.output
    assert "02-arrows-without-digits does not pass: " in done.stderr
    assert "is stale" in done.stderr


def test_a_version_without_a_task_needs_a_verified_release_to_be_made_of(run, order) -> None:
    report_of(run, 2).unlink()
    done = order(run, "--drop", "digits", "--seq", 9, release=2)
    assert (done.returncode, "verify it first" in done.stderr) == (1, True), done.output


def test_the_weights_of_a_version_without_a_task_are_compared_with_the_factors_that_are_left(run) -> None:
    release = report_of(run).parent
    variant = Variant(context_of(run), "fp32")
    found = check_without_tasks(Release.read(release), variant, 2, ["arrows"])
    assert found.weights.verdict is found.verdict is Verdict.PASS
    assert check_without_tasks(Release.read(release), variant, 2, ["digits"]).weights.verdict is Verdict.FAIL
    tensors = dict(read_tensors(release / "textual.safetensors"))
    name = next(name for name, value in tensors.items() if value.ndim == 2)
    tensors[name] = np.nextafter(tensors[name], np.float32(np.inf))
    write_tensors(release / "textual.safetensors", tensors)
    reseal(release)
    found = check_without_tasks(Release.read(release), variant, 2, ["arrows"])
    assert found.weights.verdict is Verdict.FAIL
    assert f"{name} is not base + factors" in found.weights.detail


def test_fp16_leaves_room_on_the_built_in_model_which_amplifies_the_rounding_of_weights(tmp_path) -> None:
    recipe = '[base]\nmodel = "builtin:photo"\n[[tasks]]\nname = "clothing10"\nsource = "builtin:clothing10"\n'
    (tmp_path / "recipe.toml").write_text(recipe)
    context = RunContext(RunFolder(tmp_path / "run"), load_recipe(tmp_path / "recipe.toml"), "cpu", NoProgress())
    pixels = next(context.tests["clothing10"].batches(8))
    with torch.inference_mode():
        single = context.clip.encode_image(pixels)
        for weight in context.clip.model.visual.parameters():
            weight.copy_(weight.half())
        lost = 1 - (single * context.clip.encode_image(pixels)).sum(1).min().item()
    assert 1e-6 < lost * bundle.ROOM["fp16"] ** 2 < 1 - GATES["fp16"].min_cosine
