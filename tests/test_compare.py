"""`r1export compare`: verified runs side by side, through the real command line."""

import copy
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from r1export.cli import app

EXAMPLE = json.loads((Path(__file__).parent / "report" / "report_example.json").read_text("utf-8"))


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    folders = []
    for name, last in (("ours", 0.8), ("baseline", 0.7)):
        report = {
            "schema": EXAMPLE["schema"],
            "verdict": "pass",
            "reasons": [],
            "accuracy": copy.deepcopy(EXAMPLE["accuracy"]) | {"last": last},
            "releases": [EXAMPLE],
        }
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(report))
        folders.append(tmp_path / name)
    return folders


def test_runs_are_compared_on_the_screen_and_in_files(runs: list[Path], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["compare", *map(str, runs), "--out", str(tmp_path / "c")], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "80.0 %" in done.output
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["comparison.html", "comparison.json"]


def test_json_is_one_document_on_stdout(runs: list[Path]) -> None:
    done = CliRunner().invoke(app, ["compare", *map(str, runs), "--json"])
    assert [run["last"] for run in json.loads(done.stdout)["runs"]] == [0.8, 0.7]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "expected an object"),
        ('{"verdict": "banana"}', "'schema' is a required property"),
        (
            '{"schema": "r1export.report/1", "verdict": "banana", "reasons": [], "release": {}}',
            "verdict: 'banana' is not one of",
        ),
        (
            '{"schema": "r1export.report/1", "verdict": "pass", "reasons": [], "release": 3}',
            "release: 3 is not of type",
        ),
        (
            '{"schema": "r1export.report/1", "verdict": "pass", "reasons": []}',
            "not valid under any of the given schemas",
        ),
    ],
)
def test_a_report_that_is_none_is_refused_in_one_line(text: str, words: str, runs: list[Path]) -> None:
    (runs[0] / "report.json").write_text(text)
    for arguments in (["report", str(runs[0])], ["compare", *map(str, runs)]):
        done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
        assert done.exit_code == 2, done.exception
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_report_with_no_more_than_its_verdict_is_shown(tmp_path: Path) -> None:
    report = {"schema": EXAMPLE["schema"], "verdict": "pass", "reasons": [], "release": None, "latency": {"ratio": 1.0}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    done = CliRunner().invoke(app, ["report", str(tmp_path)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.exception
    assert "unnamed" in done.stdout


def test_a_folder_without_a_report_and_a_place_that_is_taken_are_refused_in_one_line(
    runs: list[Path], tmp_path: Path
) -> None:
    done = CliRunner().invoke(app, ["compare", str(runs[0]), str(tmp_path)])
    assert done.exit_code == 2
    assert "verify it first" in done.stderr
    taken = CliRunner().invoke(app, ["compare", *map(str, runs), "--out", str(runs[0])])
    assert taken.exit_code == 2
    assert "is already there" in taken.stderr
