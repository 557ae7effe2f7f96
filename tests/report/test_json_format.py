"""report.json is written and read by the types, and its schema is made from them."""

import json
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
from report.examples import release, run

from r1export.errors import InputError
from r1export.report.json_format import json_schema, read_report, to_json
from r1export.verify.results import Latency, Report

SCHEMA = json.loads(files("r1export.report").joinpath("report.schema.json").read_text("utf-8"))
EXAMPLES = {"release": release(), "run": run(), "inconclusive": run(release(latency=Latency.unmeasured("busy")))}


def written(report: Report, folder: Path, **changes) -> Path:
    path = folder / "report.json"
    path.write_text(json.dumps(to_json(report) | changes))
    return path


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_is_written_is_read_back_the_same(name: str, tmp_path: Path) -> None:
    assert read_report(written(EXAMPLES[name], tmp_path), "again") == EXAMPLES[name]


def test_the_published_schema_is_the_one_that_the_types_give() -> None:
    """To write it anew: python scripts/report_schema.py"""
    assert json_schema() == SCHEMA
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("name", EXAMPLES)
def test_reports_obey_the_published_schema(name: str) -> None:
    jsonschema.validate(to_json(EXAMPLES[name]), SCHEMA)


def checks_of(document: dict, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The places of all checks in a report."""
    if "looked_at" in document:
        return [path]
    return [
        found for key, part in document.items() if isinstance(part, dict) for found in checks_of(part, (*path, key))
    ]


PLACES = checks_of(to_json(release()))


def test_every_check_is_in_the_document() -> None:
    assert len(PLACES) == len(list(release().checks()))


@pytest.mark.parametrize("fault", ["missing", "null", "nothing looked at", "half", "unknown verdict"])
@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_a_check_that_is_missing_or_half_filled_is_no_report(
    place: tuple[str, ...], fault: str, tmp_path: Path
) -> None:
    document = to_json(release())
    parent = document
    for key in place[:-1]:
        parent = parent[key]
    faults = {
        "missing": None,
        "null": None,
        "nothing looked at": {"looked_at": 0, "of": 0},
        "half": {"looked_at": 1, "of": 2},
    }
    if fault == "missing":
        del parent[place[-1]]
    elif fault == "null":
        parent[place[-1]] = None
    elif fault == "unknown verdict":
        parent[place[-1]]["verdict"] = "passed"
    else:
        parent[place[-1]] |= faults[fault]
    path = tmp_path / "report.json"
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match="not a report of the format"):
        read_report(path, "verify it again")


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_verdict_that_does_not_follow_from_the_checks_is_refused(name: str, tmp_path: Path) -> None:
    report = EXAMPLES[name]
    other = "fail" if report.verdict == "pass" else "pass"
    with pytest.raises(InputError, match="does not follow from its checks"):
        read_report(written(report, tmp_path, verdict=other), "again")


def test_a_release_in_a_run_cannot_contradict_its_checks_either(tmp_path: Path) -> None:
    document = to_json(run())
    document["releases"][1]["verdict"] = "fail"
    (tmp_path / "report.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="04-oxford_pets: the verdict 'fail' does not follow"):
        read_report(tmp_path / "report.json", "again")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("[]", "its schema is"),
        ("{}", "its schema is None"),
        ('{"schema": "r1export.report/1", "verdict": "pass", "release": {}}', "r1export.report/1"),
        ("[" * 100_000, "RecursionError|recursion"),
    ],
)
def test_what_is_no_report_is_refused_with_the_remedy(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_report(path, "recreate it with r1export verify RUN")
    assert caught.value.remedy == "recreate it with r1export verify RUN"
    with pytest.raises(InputError, match="no such file"):
        read_report(tmp_path / "none.json", "again")


def test_text_without_meaning_for_a_terminal_is_all_that_is_written() -> None:
    facts = release().release
    document = to_json(release(release=type(facts)(**vars(facts) | {"name": "a\x1b[2J\ud800b"})))
    assert "\x1b" not in document["release"]["name"]
    json.dumps(document, ensure_ascii=False).encode("utf-8")
