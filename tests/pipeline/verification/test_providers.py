"""A run verified in three runtimes by the real command line: parity in each, the program and the time where there are any."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from running import QUICK, RECIPE, context_of, r1export, trained_run

from r1export.pipeline.environment import absent, runtimes
from r1export.pipeline.verification.run import verify_run
from r1export.update.release_manifest import ReleaseManifest
from r1export.verify.golden import golden_parity
from r1export.verify.results import RunReport

ASKED = ("cpu", "openvino", "reference")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory.mktemp("providers"), RECIPE, 'export.variants=["fp16", "int8"]')


@pytest.fixture(scope="module")
def report(run: Path) -> RunReport:
    return verify_run(context_of(run), ASKED, QUICK)


def test_parity_holds_in_every_runtime_and_precision(report: RunReport) -> None:
    for release in report.releases:
        stages = [stage for stage in (release.parity.export, release.parity.total) if stage.verdict != "not_applicable"]
        for stage in stages:
            assert stage.verdict == "pass", stage.detail
            assert list(stage.by_provider) == list(ASKED)
            assert max(one.max_abs for one in stage.by_provider.values()) == stage.max_abs
    fp32 = [r.parity.export.by_provider for r in report.releases if r.release.precision == "fp32"]
    assert all(one.max_abs < 5e-6 for found in fp32 for one in found.values())


def test_the_program_is_proven_in_openvino_too(report: RunReport) -> None:
    for release in report.releases:
        assert release.proof.executed_ops.verdict == "pass"
        assert "visual.onnx on openvino" in release.proof.optimized_graph.detail


def test_time_is_taken_where_it_says_something(report: RunReport, run: Path) -> None:
    latency = report.releases[1].latency
    assert set(latency.by_provider) == set(latency.providers) == {"CPUExecutionProvider", "OpenVINO"}
    assert set(report.releases[-1].variant.speed) == {"cpu", "openvino"}
    page = (run / "report.md").read_text()
    assert "By provider: CPU" in page
    assert "Max. difference on openvino" in page


def test_what_was_not_measured_is_said_with_its_reason(report: RunReport, run: Path) -> None:
    assert report.environment.runtimes["OpenVINO"] == "measured"
    assert runtimes(["cpu"])["OpenVINO"] == "not measured, not requested (--provider openvino)"
    if absent("cuda"):
        assert report.environment.runtimes["CUDA"] == "not measured, no device"
        assert "CUDA: not measured, no device" in (run / "report.md").read_text()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("provider", ["openvino", "reference"])
def test_golden_samples_of_torch_are_reproduced(run: Path, precision: str, provider: str) -> None:
    exports = run if precision == "fp32" else run / "variants" / precision
    release = exports / "releases" / "01-digits"
    parity = golden_parity(release, ReleaseManifest.read(release), [provider])
    assert parity.verdict == "pass", parity.detail


def test_an_openvino_that_is_not_installed_is_named_before_anything_is_measured(run: Path, monkeypatch) -> None:
    monkeypatch.setattr("r1export.verify.runtimes.openvino_runtime.installed", lambda: False)
    for path in (run, run / "releases" / "01-digits"):
        done = r1export("verify", path, "--provider", "openvino")
        assert done.returncode == 3
        assert "pip install r1export[openvino]" in done.output
        assert "Verifying" not in done.output


def test_the_reference_alone_gives_parity_and_no_time(run: Path) -> None:
    done = r1export("verify", run / "releases" / "01-digits", "--provider", "reference", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["verdict"], found["latency"]["verdict"]) == (0, "pass", "not_applicable")
