"""The report never says more than was measured, and says it the same way in every format."""

import copy
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1export.errors import InputError
from r1export.report.checks import overall
from r1export.report.write import checked, render_html, render_junit, render_markdown, settled, write_report
from r1export.verify.proof import unclimbed

EXAMPLE = json.loads((Path(__file__).parent / "report_example.json").read_text("utf-8"))
SCHEMA = json.loads(files("r1export.report").joinpath("report.schema.json").read_text("utf-8"))
RUNGS = {
    "same_file": "L0 Same file",
    "graph": "L1 Graph",
    "optimized_graph": "L2 Optimised graph",
    "executed_ops": "L3 Executed ops",
    "cost": "L4 Cost",
}
PARTS = [
    *(("parity", stage) for stage in ("merge", "export", "total")),
    *(("proof", rung) for rung in RUNGS),
    ("latency",),
]
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=y> ]]> & | `a` *b* [c](http://d) $\\frac{1}{2}$ 花卉 \x00\x1b\u202e\ud800 url(#x)"


@pytest.fixture
def report() -> dict:
    return copy.deepcopy(EXAMPLE)


@pytest.fixture
def run(report: dict) -> dict:
    second = copy.deepcopy(report)
    second["release"]["name"] = "04-oxford_pets"
    shared = {key: report[key] for key in ("schema", "created", "r1export", "accuracy", "environment")}
    return {
        **shared,
        "verdict": "pass",
        "reasons": [],
        "recipe": {"train": {"iterations": 50}},
        "releases": [report, second],
    }


class Page(HTMLParser):
    """What a browser would make of a page: tags, attributes, and the text of each table row."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append("")

    def handle_data(self, data: str) -> None:
        if self.rows:
            self.rows[-1] += data + " "

    def row(self, name: str) -> str:
        return next(row for row in self.rows if row.startswith(name))


def part_of(report: dict, path: tuple[str, ...]) -> dict:
    for key in path:
        report = report[key]
    return report


def markdown_row(report: dict, name: str) -> str:
    return next(line for line in render_markdown(report).splitlines() if line.startswith(f"| {name} |"))


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["pass", "pass"], "pass"),
        (["pass", "not measured"], "pass"),
        (["pass", None], "pass"),
        (["pass", "inconclusive"], "inconclusive"),
        (["pass", "inconclusive", "fail"], "fail"),
        (["fail", "not measured"], "fail"),
        (["not measured", None], "inconclusive"),
        ([], "inconclusive"),
    ],
)
def test_fail_beats_inconclusive_beats_pass_and_nothing_is_inconclusive(verdicts: list, expected: str) -> None:
    assert overall(verdicts) == expected


@given(st.lists(st.sampled_from(["pass", "fail", "inconclusive", "not measured"]), min_size=1), st.randoms())
def test_the_order_of_verdicts_does_not_matter(verdicts: list[str], random) -> None:
    shuffled = random.sample(verdicts, len(verdicts))
    assert overall(shuffled) == overall(verdicts)


def test_a_word_that_is_no_verdict_is_refused() -> None:
    with pytest.raises(ValueError, match="found the verdict 'passed', expected one of pass"):
        overall(["pass", "passed"])


def test_a_passed_report_stays_as_it_is(report: dict) -> None:
    assert settled(report) == report
    assert render_markdown(report).startswith("# Release 03-flowers-17: Passed\n")
    assert "All 10 checks passed." in render_html(report)


def test_a_failed_report_gives_its_reason_before_anything_else(report: dict) -> None:
    report |= {"verdict": "fail", "reasons": ["Top-1 flipped. Run `r1export verify` again."]}
    report["parity"]["total"]["verdict"] = "fail"
    lines = render_markdown(report).splitlines()
    assert lines[0] == "# Release 03-flowers-17: Failed"
    assert lines[2] == "- Top-1 flipped. Run `r1export verify` again."
    html = render_html(report)
    body = html[html.index("<body>") :]
    assert (
        body.index("Failed")
        < body.index("Top-1 flipped. Run <code>r1export verify</code> again.")
        < body.index("Largest difference")
    )


@pytest.mark.parametrize("verdict", ["fail", "inconclusive"])
@pytest.mark.parametrize("path", PARTS, ids=".".join)
def test_a_pass_that_one_part_contradicts_becomes_the_verdict_of_that_part(
    report: dict, path: tuple[str, ...], verdict: str
) -> None:
    part_of(report, path)["verdict"] = verdict
    result = settled(report)
    assert result["verdict"] == verdict
    assert len(result["reasons"]) == 1
    assert settled(result) == result


def test_a_proof_that_does_not_notice_the_unmerged_model_fails(report: dict) -> None:
    report["proof"]["control"]["unmerged"] = {"detected": False, "detail": "The digests are equal."}
    assert settled(report)["verdict"] == "fail"
    assert settled(report)["reasons"] == ["Control: unmerged: failed. The digests are equal."]


def test_a_control_that_gave_no_answer_is_inconclusive_and_one_that_nobody_tried_is_not_measured(report: dict) -> None:
    report["proof"]["control"]["unmerged"] = {"detected": None, "detail": "onnxruntime refuses the model"}
    assert settled(report)["verdict"] == "inconclusive"
    assert settled(report)["reasons"] == ["Control: unmerged: inconclusive. onnxruntime refuses the model"]
    del report["proof"]["control"]
    report["verdict"], report["reasons"] = "pass", []
    assert settled(report)["verdict"] == "pass"
    assert "Not measured" in markdown_row(report, "Control: unmerged")


def test_rungs_that_could_not_be_climbed_leave_no_pass(report: dict) -> None:
    report["proof"] |= unclimbed("the base cannot be run")
    assert settled(report)["verdict"] == "inconclusive"
    assert "L2 Optimised graph: inconclusive. the base cannot be run" in settled(report)["reasons"]


def test_the_tower_that_was_timed_is_named(report: dict) -> None:
    report["latency"]["tower"] = "textual"
    assert "pairs of the textual tower." in markdown_row(report, "L5 Time")


def test_a_pass_without_any_measurement_is_inconclusive() -> None:
    result = settled({"verdict": "pass", "release": {"name": "00-base"}})
    assert result["verdict"] == "inconclusive"
    assert result["reasons"] == ["Nothing was measured. Run `r1export verify`."]


def test_a_run_is_no_better_than_its_worst_release(run: dict) -> None:
    run["releases"][1]["proof"]["graph"]["verdict"] = "fail"
    result = settled(run)
    assert result["verdict"] == "fail"
    assert result["reasons"][0].startswith("04-oxford_pets: failed. L1 Graph: failed.")
    assert settled(result) == result


@pytest.mark.parametrize("absent", ["key", "null", "word"])
@pytest.mark.parametrize("rung", RUNGS)
def test_a_rung_that_was_not_measured_is_never_shown_as_passed(report: dict, rung: str, absent: str) -> None:
    if absent == "key":
        del report["proof"][rung]
    else:
        report["proof"][rung] = None if absent == "null" else {"verdict": "not measured"}
    row = markdown_row(report, RUNGS[rung])
    assert "Not measured" in row
    assert "Passed" not in row
    assert "10 checks: 9 passed, 1 not measured." in render_markdown(report)
    assert "1 of 5 not measured" in markdown_row(report, "Same program")


def test_the_page_shows_no_rung_as_passed_without_a_proof(report: dict) -> None:
    report["proof"] = None
    page = Page(render_html(report))
    for title in (*RUNGS.values(), "Control: unmerged", "Same program"):
        assert "Not measured" in page.row(title)
        assert "Passed" not in page.row(title)


@pytest.mark.parametrize("figure", [float("nan"), float("inf"), np.float32("nan")])
def test_a_difference_that_is_not_a_number_is_null_and_not_passed(report: dict, figure: float) -> None:
    report["parity"]["total"]["max_abs"] = figure
    result = settled(report)
    assert result["parity"]["total"]["max_abs"] is None
    assert result["verdict"] == "inconclusive"
    assert "NaN" not in json.dumps(result)


def test_numpy_numbers_are_written_as_numbers(report: dict, tmp_path: Path) -> None:
    report["latency"]["ratio"] = np.float32(1.5)
    report["parity"]["merge"]["samples"] = np.int64(7)
    report["proof"]["control"]["unmerged"]["detected"] = np.bool_(True)
    write_report(report, tmp_path)
    written = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert written["latency"]["ratio"] == 1.5
    assert written["parity"]["merge"]["samples"] == 7
    assert written["verdict"] == "pass"


def test_reports_of_releases_and_runs_obey_the_published_schema(report: dict, run: dict) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for example in (report, run, {"verdict": "pass", "release": {"name": "00-base"}}):
        jsonschema.validate(settled(example), SCHEMA)


@pytest.mark.parametrize("path", [(), *PARTS], ids=lambda path: ".".join(path) or "report")
def test_the_schema_refuses_a_word_that_is_no_verdict(report: dict, path: tuple[str, ...]) -> None:
    part_of(report, path)["verdict"] = "passed"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(report, SCHEMA)


def test_a_report_with_a_part_of_the_wrong_shape_is_refused_by_its_place(run: dict) -> None:
    run["releases"][1]["latency"]["ci95"] = [1.0]
    with pytest.raises(InputError, match=r"report\.json: not a report: releases\[1\]\.latency\.ci95: .*again"):
        checked(run, Path("report.json"), "again")


def test_a_run_whose_accuracy_has_holes_is_refused(run: dict) -> None:
    run["accuracy"] = run["accuracy"] | {"zero_shot": [None]}
    with pytest.raises(InputError, match=r"accuracy\.zero_shot\[0\]: None is not of type"):
        checked(run, Path("report.json"), "again")


def hostile(value: object, key: str = "") -> object:
    """The same report with a hostile text in place of every free text and every free name."""
    if isinstance(value, dict):
        free = key in ("weights", "graph", "towers", "environment", "providers")
        return {(HOSTILE if free and key != "graph" else name): hostile(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return [hostile(part) for part in value]
    return HOSTILE if isinstance(value, str) and key not in ("verdict", "schema") else value


def test_hostile_names_stay_text_in_every_format(report: dict, run: dict) -> None:
    report["parity"]["total"]["flips"] = [{"sample": 1, "margin": 1e-5, "from": "cat", "to": "dog"}]
    report["reasons"] = run["reasons"] = ["none"]
    for example in (hostile(report), hostile(run)):
        tags = Page(render_html(example)).tags
        assert not {"script", "img", "a", "iframe", "object", "link"} & {tag for tag, _ in tags}
        assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
        assert "<" not in re.sub(r"`[^`]*`", "", render_markdown(example))
        ElementTree.fromstring(render_junit(example).encode())
        for svg in re.findall(r"<svg.*?</svg>", render_html(example), re.S):
            ElementTree.fromstring(svg)
        json.dumps(settled(example), ensure_ascii=False).encode("utf-8")


def test_a_bar_in_a_name_does_not_split_a_markdown_cell(report: dict) -> None:
    report["proof"]["cost"]["detail"] = "a | b"
    assert r"a \| b" in markdown_row(report, "L4 Cost")


def test_the_page_needs_no_network_and_no_script(run: dict) -> None:
    html = render_html(run)
    for tag, attributes in Page(html).tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed")
        for name in ("src", "href", "xlink:href", "data", "action"):
            assert attributes.get(name, "#").startswith("#")
    assert re.findall(r"https?://[^\"' ]+", html.replace("http://www.w3.org/2000/svg", "")) == []
    assert not re.search(r"@import|url\((?!#)", html)


def test_every_reference_inside_a_picture_points_into_that_picture(run: dict) -> None:
    pictures = re.findall(r"<svg.*?</svg>", render_html(run), re.S)
    assert len(pictures) == 8  # matrix and curves; errors, latency and sizes of two releases
    seen: set[str] = set()
    for picture in pictures:
        names = re.findall(r' id="([^"]+)"', picture)
        used = [a or b for a, b in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', picture)]
        assert set(used) == set(names)
        assert not seen & set(names)
        seen |= set(names)


def test_pictures_use_the_colours_and_the_font_of_the_page(report: dict) -> None:
    pictures = "".join(re.findall(r"<svg.*?</svg>", render_html(report), re.S))
    assert "var(--ink)" in pictures
    assert re.findall(r"#[0-9a-f]{6}\b", pictures) == []
    assert "DejaVu" not in pictures


def test_every_picture_is_described_in_words(report: dict) -> None:
    labels = [attributes["aria-label"] for tag, attributes in Page(render_html(report)).tags if tag == "svg"]
    assert "this update 144.6 kB, 0.024 % of the weights" in " ".join(map(str, labels))
    assert "Last row, after flowers-17: digits 93.2 %" in " ".join(map(str, labels))


def test_pictures_appear_only_when_there_is_something_to_draw(report: dict) -> None:
    for key in ("accuracy", "latency"):
        report[key] = None
    report["release"]["bytes"] = {}
    for stage in report["parity"].values():
        stage["histogram"] = None
    page = render_html(report)
    assert "<svg" not in page
    assert "<figure" not in page
    assert page.count("Not measured.</p>") == 2


def test_the_same_report_gives_the_same_bytes(run: dict) -> None:
    for render in (render_html, render_markdown, render_junit):
        assert render(run) == render(copy.deepcopy(run))


def test_junit_counts_what_failed_and_skips_what_nobody_knows(report: dict) -> None:
    report["parity"]["total"]["verdict"] = "fail"
    report["latency"]["verdict"] = "inconclusive"
    report["proof"]["cost"] = None
    root = ElementTree.fromstring(render_junit(report).encode())
    suite = root[0]
    assert [root.get(name) for name in ("tests", "failures", "skipped", "errors")] == ["11", "2", "2", "0"]
    assert [case.get("name") for case in suite if case.find("failure") is not None] == ["total", "verdict"]
    skipped = {case.get("name"): case[0].get("message", "") for case in suite if case.find("skipped") is not None}
    assert skipped["cost"] == "not measured"
    assert skipped["time"].startswith("inconclusive: 1.001 times the base")


def test_junit_of_a_run_has_one_suite_per_release_and_one_for_the_run(run: dict) -> None:
    root = ElementTree.fromstring(render_junit(run).encode())
    assert [(suite.get("name"), len(suite)) for suite in root] == [
        ("03-flowers-17", 11),
        ("04-oxford_pets", 11),
        ("run", 1),
    ]
    assert root.get("tests") == "23"
    assert root.get("failures") == "0"


def test_a_run_lists_its_releases_and_its_recipe(run: dict) -> None:
    text = render_markdown(run)
    assert text.startswith("# Run of 2 releases: Passed\n")
    assert "| 04-oxford_pets | **✓ Passed** | 3.1e-6 |" in text
    assert "- train.iterations: 50" in text
    assert render_html(run).count("<summary><span>0") == 2


def test_parity_is_shown_beside_its_control_and_the_least_tolerance(report: dict) -> None:
    assert markdown_row(report, "Largest difference") == "| Largest difference | 4.2e-7 | 2.9e-6 | 3.1e-6 |"
    assert markdown_row(report, "Tolerance") == "| Tolerance | 5.0e-5 | 5.0e-5 | 5.0e-5 |"
    assert (
        markdown_row(report, "Least tolerance that would pass")
        == "| Least tolerance that would pass | 4.2e-7 | 2.9e-6 | 3.1e-6 |"
    )
    assert markdown_row(report, "Control: base model") == "| Control: base model | 3.8e-7 | 2.6e-6 | 2.8e-6 |"


def test_agreement_that_is_not_complete_is_never_rounded_to_100_percent(report: dict) -> None:
    report["parity"]["total"]["top1_agreement"] = 0.999999
    assert "99.99 %" in markdown_row(report, "Same top-1 answer")


def test_digests_that_differ_are_shown_side_by_side(report: dict) -> None:
    report["proof"]["graph"] |= {"verdict": "fail", "digest": "a" * 64, "expected": "b" * 64}
    assert f"Found `{'a' * 16}`, expected `{'b' * 16}`." in markdown_row(report, "L1 Graph")


def test_all_four_files_are_written_and_nothing_is_left_beside_them(report: dict, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.md", "report.xml"]
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == report
    assert (tmp_path / "report.html").read_text("utf-8") == render_html(report)


def test_a_report_that_cannot_be_written_leaves_the_one_before_as_it_was(report: dict, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    report["environment"]["gpu"] = object()
    with pytest.raises(TypeError):
        write_report(report, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
