"""`r1export compare` and `r1export report`: verified runs, through the real command line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from report.examples import accuracy, release, run
from typer.testing import CliRunner
from verify.manifests import manifest_of

from r1export.cli import app
from r1export.report.write import write_report
from r1export.update.atomic_io import sha256_file
from r1export.verify.results import Latency, ReleaseReport, RunReport


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def verified_release(folder: Path, **changes) -> ReleaseReport:
    """A release of one file on disk, and the report about it."""
    folder.mkdir(parents=True)
    (folder / "visual.onnx").write_bytes(b"a graph")
    manifest_of(folder, ("visual.onnx",)).write(folder)
    facts = replace(release().release, name=folder.name, manifest_sha256=sha256_file(folder / "manifest.json"))
    report = release(release=facts, **changes)
    write_report(report, folder)
    return report


def verified_run(folder: Path, last: float = 0.8, **changes) -> RunReport:
    report = run(verified_release(folder / "releases" / "01-digits", **changes), accuracy=accuracy(last=last))
    write_report(report, folder)
    return report


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    for name, last in (("ours", 0.8), ("baseline", 0.7)):
        verified_run(tmp_path / name, last)
    return [tmp_path / "ours", tmp_path / "baseline"]


def test_runs_are_compared_on_the_screen_and_in_files(runs: list[Path], tmp_path: Path) -> None:
    done = invoke("compare", *runs, "--out", tmp_path / "c")
    assert done.exit_code == 0, done.output
    assert "80.0 %" in done.output
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["comparison.html", "comparison.json"]


def test_json_is_one_document_on_stdout(runs: list[Path]) -> None:
    done = invoke("compare", *runs, "--json")
    assert [run["last"] for run in json.loads(done.stdout)["runs"]] == [0.8, 0.7]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "its schema is"),
        ('{"schema": "r1export.report/1", "verdict": "pass", "reasons": [], "release": {}}', "r1export.report/1"),
        ('{"schema": "r1export.report/2", "verdict": "pass", "reasons": [], "release": 3}', "created: Field required"),
    ],
)
def test_a_report_that_is_none_is_refused_in_one_line(text: str, words: str, runs: list[Path]) -> None:
    (runs[0] / "report.json").write_text(text)
    for done in (invoke("report", runs[0]), invoke("compare", *runs)):
        assert done.exit_code == 2, done.exception
        assert words in done.stderr
        assert f"r1export verify {runs[0]}" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_report_with_an_edited_verdict_is_refused(runs: list[Path]) -> None:
    document = json.loads((runs[0] / "report.json").read_text())
    (runs[0] / "report.json").write_text(json.dumps(document | {"verdict": "fail"}))
    done = invoke("report", runs[0])
    assert done.exit_code == 2
    assert "does not follow from its checks" in done.stderr


@pytest.mark.parametrize(
    ("changes", "code"),
    [({}, 0), ({"latency": Latency.unmeasured("busy")}, 4), ({"latency": Latency.failed("slower")}, 1)],
)
def test_report_and_compare_end_with_the_code_of_the_verdict(changes: dict, code: int, tmp_path: Path) -> None:
    verified_run(tmp_path / "one", **changes)
    verified_run(tmp_path / "two")
    assert invoke("report", tmp_path / "one").exit_code == code
    assert invoke("report", tmp_path / "one" / "releases" / "01-digits").exit_code == code
    assert invoke("compare", tmp_path / "one", tmp_path / "two").exit_code == code


@pytest.mark.parametrize("damage", ["changed file", "missing file", "link", "other manifest", "no manifest"])
def test_a_report_about_a_release_that_changed_since_is_not_shown(damage: str, runs: list[Path]) -> None:
    folder = runs[0] / "releases" / "01-digits"
    if damage == "changed file":
        (folder / "visual.onnx").write_bytes(b"another")
    elif damage == "missing file":
        (folder / "visual.onnx").unlink()
    elif damage == "link":
        (folder / "visual.onnx").rename(runs[0] / "elsewhere")
        (folder / "visual.onnx").symlink_to(runs[0] / "elsewhere")
    elif damage == "other manifest":
        manifest_of(folder, ("visual.onnx",), sequence=2).write(folder)
    else:
        (folder / "manifest.json").unlink()
    for done in (invoke("report", runs[0]), invoke("report", folder), invoke("compare", *runs)):
        assert done.exit_code == 1, done.output
        assert "changed after it was verified" in done.stderr
        assert "Passed" not in done.stdout
    assert "verify it again" in invoke("report", runs[0]).stderr


def test_a_release_is_no_run_to_compare(runs: list[Path]) -> None:
    done = invoke("compare", runs[0], runs[1] / "releases" / "01-digits")
    assert done.exit_code == 2
    assert "report of a release, expected the report of a run" in done.stderr


def test_a_folder_without_a_report_and_a_place_that_is_taken_are_refused_in_one_line(
    runs: list[Path], tmp_path: Path
) -> None:
    done = invoke("compare", runs[0], tmp_path)
    assert done.exit_code == 2
    assert "recreate it with r1export verify" in done.stderr
    taken = invoke("compare", *runs, "--out", runs[0])
    assert taken.exit_code == 2
    assert "exists" in taken.stderr


def test_the_json_of_report_is_the_report(runs: list[Path]) -> None:
    done = invoke("report", runs[0], "--json")
    assert json.loads(done.stdout) == json.loads((runs[0] / "report.json").read_text())
