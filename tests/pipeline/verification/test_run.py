"""The report of a run, and `verify RUN --release N`: the release that is new, with all its checks, without the others again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from running import QUICK, context_of, r1export

from r1export.pipeline.verification.run import verify_run
from r1export.report.json_format import to_json

ONLY_SECOND = "only 00-base and 02-arrows: --release 2"


@pytest.fixture
def run(verified: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(verified, tmp_path / "run"))


def report_of(run: Path, release: str) -> dict:
    return json.loads((run / "releases" / release / "report.json").read_text())


def test_the_report_that_is_returned_is_the_one_that_is_written(run: Path) -> None:
    report = verify_run(context_of(run), budget=None)
    assert to_json(report) == json.loads((run / "report.json").read_text())
    assert report.examples


def test_it_finds_of_that_release_what_the_whole_run_finds(run: Path) -> None:
    before = {name: report_of(run, name) for name in ("00-base", "02-arrows")}
    for name in before:
        (run / "releases" / name / "report.json").unlink()
    done = r1export("verify", run, "--release", 2, "--no-latency")
    assert done.returncode == 0, done.output
    for name, report in before.items():
        again = report_of(run, name)
        assert {part: again[part] for part in ("contents", "proof")} == {
            part: report[part] for part in ("contents", "proof")
        }
        assert again["parity"].keys() == report["parity"].keys()
        for stage, found in again["parity"].items():
            assert (found["verdict"], found["looked_at"]) == (
                report["parity"][stage]["verdict"],
                report["parity"][stage]["looked_at"],
            )


def test_what_was_left_out_is_said_and_no_report_of_the_run_remains(run: Path) -> None:
    others = (run / "releases/01-digits/report.json").read_bytes()
    done = r1export("verify", run, "--release", 2, "--no-latency", "--json")
    assert done.returncode == 0, done.output
    document = json.loads(done.stdout)
    assert [part["release"]["name"] for part in document["releases"]] == ["00-base", "02-arrows"]
    assert document["contents"]["releases"]["verdict"] == "not_applicable"
    assert document["contents"]["releases"]["detail"] == ONLY_SECOND
    assert ONLY_SECOND in " ".join(done.stderr.split())
    assert not (run / "report.json").exists(), "it would be about all releases"
    assert (run / "releases/01-digits/report.json").read_bytes() == others


def test_a_fault_is_found_in_that_release_and_in_the_base_and_not_looked_for_in_others(run: Path) -> None:
    graph = run / "releases/01-digits/visual.onnx"
    graph.write_bytes(b"no graph")
    assert r1export("verify", run, "--release", 2, "--no-latency").returncode == 0
    done = r1export("verify", run, "--release", 1, "--no-latency")
    assert done.returncode == 1
    assert "01-digits" in done.output
    (run / "releases/00-base/visual.onnx").write_bytes(b"no graph")
    assert r1export("verify", run, "--release", 2, "--no-latency").returncode == 1


def test_the_release_can_be_signed_afterwards(run: Path, tmp_path: Path) -> None:
    (run / "releases/02-arrows/report.json").unlink()
    key = ("--key", run.parent / "fleet.key")
    assert r1export("keygen", run.parent / "fleet").returncode == 0
    bundle = ("bundle", run, "--release", 2, *key, "-o", tmp_path / "update.r1u")
    refused = r1export(*bundle)
    assert refused.returncode == 1, refused.output
    assert r1export("verify", run, "--release", 2, "--no-latency").returncode == 0
    done = r1export(*bundle)
    assert done.returncode == 0, done.output


def test_the_base_can_be_verified_alone(run: Path) -> None:
    done = r1export("verify", run, "--release", 0, "--no-latency", "--json")
    assert done.returncode == 0, done.output
    assert [part["release"]["name"] for part in json.loads(done.stdout)["releases"]] == ["00-base"]


@pytest.mark.parametrize("number", [3, -1])
def test_a_release_that_is_not_there_is_an_error_and_no_report_is_lost(run: Path, number: int) -> None:
    done = r1export("verify", run, "--release", number, "--no-latency")
    assert done.returncode == 2
    assert "this run has releases 0 to 2" in " ".join(done.output.split())
    assert (run / "report.json").exists()


@pytest.mark.parametrize("options", [(), ("--outputs", "embeddings.npz")])
def test_of_a_release_folder_it_is_an_error(run: Path, options: tuple[str, ...]) -> None:
    done = r1export("verify", run / "releases/02-arrows", "--release", 2, *options)
    assert done.returncode == 2
    assert "needs a run" in done.output


def test_it_is_timed_against_the_base_also_if_later_releases_are_not(run: Path) -> None:
    base, first = verify_run(context_of(run), budget=QUICK, only=1).releases
    assert base.latency.verdict == "not_applicable"
    assert first.latency.pairs > 0
    assert first.latency.unmerged_ratio is not None
    assert report_of(run, "01-digits")["latency"]["pairs"] == first.latency.pairs
