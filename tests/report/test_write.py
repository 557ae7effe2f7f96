"""A report never says more than was measured, and says it the same way in every format."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report.examples import release, run, stage

from r1export.report.write import remove_reports, render_html, render_junit, render_markdown, write_report
from r1export.verify.results import (
    TITLES,
    UNTIMED,
    Answer,
    Check,
    Example,
    Flip,
    Latency,
    Parity,
    ParityStages,
    Proof,
    Report,
    Rung,
    Verdict,
)

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=y> ]]> & | `a` *b* [c](http://d) $\\frac{1}{2}$ 花卉 \x00\x1b\u202e\ud800 url(#x)"


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


def markdown_row(report: Report, name: str) -> str:
    return next(line for line in render_markdown(report).splitlines() if line.startswith(f"| {name} |"))


def with_total(**changes) -> ParityStages:
    stages = release().parity
    return replace(stages, total=replace(stages.total, **changes))


def test_a_passed_report_says_so_first() -> None:
    assert render_markdown(release()).startswith("# Release 03-flowers-17: Passed\n")
    assert f"{len(list(release().checks()))} checks: {len(list(release().checks()))} passed." in render_html(release())


def test_a_page_shows_examples_with_the_answers_before_and_after() -> None:
    right, wrong = Answer(name="glass", probability=0.914), Answer(name="metal & co", probability=0.5)
    report = run(examples=(Example(task="trash", name="glass", picture="UklGRg==", before=wrong, after=right),))
    html = render_html(report)
    assert ("img", {"src": "data:image/webp;base64,UklGRg==", "alt": "glass"}) in Page(html).tags
    assert html.index("\N{MULTIPLICATION X} metal &amp; co, 50 %") < html.index("\N{CHECK MARK} glass, 91 %")
    assert "Examples" not in render_html(run())


def test_a_failed_report_gives_its_reason_before_anything_else() -> None:
    report = release(parity=with_total(verdict=Verdict.FAIL, detail="Top-1 flipped. Run `r1export verify` again."))
    lines = render_markdown(report).splitlines()
    assert lines[0] == "# Release 03-flowers-17: Failed"
    assert lines[2] == "- Total parity: failed. Top-1 flipped. Run `r1export verify` again."
    html = render_html(report)
    body = html[html.index("<body>") :]
    reason = "Top-1 flipped. Run <code>r1export verify</code> again."
    assert body.index("Failed") < body.index(reason) < body.index("Max. difference")


@pytest.mark.parametrize("rung", ["same_file", "graph", "optimized_graph", "executed_ops", "cost"])
def test_a_rung_that_was_not_measured_is_never_shown_as_passed(rung: str) -> None:
    report = release(proof=replace(release().proof, **{rung: Rung.unmeasured("the base cannot be run")}))
    row = markdown_row(report, TITLES[f"proof.{rung}"])
    assert "Inconclusive** the base cannot be run" in row
    assert "Passed" not in row
    assert "1 inconclusive" in render_markdown(report)
    assert "Inconclusive" in markdown_row(report, "Same graph")


def test_what_does_not_apply_is_named_and_does_not_count_as_passed() -> None:
    report = release(proof=Proof.not_applicable("no base"), latency=Latency.not_applicable("no base"))
    page = Page(render_html(report))
    for key, title in TITLES.items():
        if key.startswith("proof"):
            assert "Not applicable" in page.row(title)
    assert "Not applicable" in page.row("Same graph")
    assert report.verdict == "pass"


def test_figures_of_what_does_not_apply_are_told_from_those_that_were_not_measured() -> None:
    merge = Parity.not_applicable("the base release has no merge")
    base = release(
        release=replace(release().release, index=0),
        parity=replace(release().parity, merge=merge, total=Parity.unmeasured("busy")),
        latency=Latency.not_applicable("the base release is the reference"),
    )
    assert markdown_row(base, "Max. difference") == "| Max. difference | not applicable | 2.9e-6 | not measured |"
    assert "## Latency\n\nNot applicable." in render_markdown(base)
    row = markdown_row(replace(run(), releases=(base,)), base.name)
    assert row.endswith("| not measured | **✓ Passed** | not applicable | not applicable |")
    untimed = render_markdown(release(latency=Latency.not_applicable(UNTIMED)))
    assert "## Latency\n\nNot measured." in untimed


def test_evidence_says_how_many_samples_were_compared() -> None:
    assert "512 of 512" in markdown_row(release(), "Samples")


def test_every_check_says_how_much_it_looked_at_of_how_much() -> None:
    share = Check.judge([], looked_at=3, of=1000, detail="")
    report = release(contents=replace(release().contents, classes=share))
    assert "looked at 3 of 1000; a pass needs all (3 of 1000)" in markdown_row(report, "Classes")
    assert "all is well (3 of 3)" in markdown_row(report, "Files")


def test_the_tower_that_was_timed_is_named() -> None:
    report = release(latency=replace(release().latency, tower="textual"))
    assert "pairs of runs of the textual tower." in markdown_row(report, "L5 Time")


def hostile(report: Report) -> Report:
    """The report with a hostile text in place of names and details."""
    facts = replace(
        report.release, name=HOSTILE, task=HOSTILE, base=HOSTILE, weights={HOSTILE: HOSTILE}, bytes={HOSTILE: 3}
    )
    failed = Check.failed(HOSTILE)
    parity = with_total(verdict=Verdict.FAIL, detail=HOSTILE, flips=(Flip(sample=1, margin=1e-5, before=0, after=1),))
    return replace(
        report, release=facts, parity=parity, contents=replace(report.contents, files=failed),
        accuracy=replace(report.accuracy, tasks=(HOSTILE, "b", "c")), environment=replace(report.environment, cpu=HOSTILE),
    )  # fmt: skip


def test_hostile_names_stay_text_in_every_format(tmp_path: Path) -> None:
    one = hostile(release())
    for example in (one, run(one, one, recipe={HOSTILE: HOSTILE})):
        tags = Page(render_html(example)).tags
        assert not {"script", "img", "a", "iframe", "object", "link"} & {tag for tag, _ in tags}
        assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
        assert "<" not in re.sub(r"`[^`]*`", "", render_markdown(example))
        ElementTree.fromstring(render_junit(example).encode())
        for svg in re.findall(r"<svg.*?</svg>", render_html(example), re.S):
            ElementTree.fromstring(svg)
        write_report(example, tmp_path)
        assert "\x1b" not in (tmp_path / "report.md").read_text("utf-8")


def test_a_bar_in_a_detail_does_not_split_a_markdown_cell() -> None:
    cost = replace(release().proof.cost, detail="a | b")
    assert r"a \| b" in markdown_row(release(proof=replace(release().proof, cost=cost)), "L4 Cost")


def test_the_page_needs_no_network_and_no_script() -> None:
    html = render_html(run())
    for tag, attributes in Page(html).tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed")
        for name in ("src", "href", "xlink:href", "data", "action"):
            assert attributes.get(name, "#").startswith("#")
    assert re.findall(r"https?://[^\"' ]+", html.replace("http://www.w3.org/2000/svg", "")) == []
    assert not re.search(r"@import|url\((?!#)", html)


def test_every_reference_inside_a_picture_points_into_that_picture() -> None:
    pictures = re.findall(r"<svg.*?</svg>", render_html(run()), re.S)
    assert len(pictures) == 8  # matrix and curves; errors, latency and sizes of two releases
    seen: set[str] = set()
    for picture in pictures:
        names = re.findall(r' id="([^"]+)"', picture)
        used = [a or b for a, b in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', picture)]
        assert set(used) == set(names)
        assert not seen & set(names)
        seen |= set(names)


def test_pictures_use_the_colours_and_the_font_of_the_page() -> None:
    pictures = "".join(re.findall(r"<svg.*?</svg>", render_html(release()), re.S))
    assert "var(--ink)" in pictures
    assert re.findall(r"#[0-9a-f]{6}\b", pictures) == []
    assert "DejaVu" not in pictures


def test_every_picture_is_described_in_words() -> None:
    labels = [attributes["aria-label"] for tag, attributes in Page(render_html(release())).tags if tag == "svg"]
    assert "this update 144.6 kB, 0.024 % of the weights" in " ".join(map(str, labels))
    assert "Last row, after flowers-17: digits 93.2 %" in " ".join(map(str, labels))


def test_pictures_appear_only_when_there_is_something_to_draw() -> None:
    nothing = Parity.failed("it could not be run")
    parity = ParityStages(merge=nothing, export=nothing, total=nothing)
    facts = replace(release().release, bytes=None, weights=None)
    page = render_html(release(parity=parity, latency=Latency.unmeasured("busy"), accuracy=None, release=facts))
    assert "<svg" not in page
    assert "<figure" not in page
    assert page.count("Not measured.</p>") == 2


def test_the_same_report_gives_the_same_bytes() -> None:
    for render in (render_html, render_markdown, render_junit):
        assert render(run()) == render(run())


def test_junit_counts_what_failed_and_skips_what_did_not_pass() -> None:
    report = release(
        parity=with_total(verdict=Verdict.FAIL),
        latency=replace(release().latency, verdict=Verdict.INCONCLUSIVE),
        proof=replace(release().proof, cost=Rung.not_applicable("nothing to compare with")),
    )
    root = ElementTree.fromstring(render_junit(report).encode())
    checks = len(list(report.checks()))
    counts = [root.get(name) for name in ("tests", "failures", "skipped", "errors")]
    assert counts == [str(checks + 1), "2", "2", "0"]
    assert [case.get("name") for case in root[0] if case.find("failure") is not None] == ["total", "verdict"]
    skipped = {case.get("name"): case[0].get("message", "") for case in root[0] if case.find("skipped") is not None}
    assert skipped["cost"] == "not applicable: nothing to compare with"
    assert skipped["latency"].startswith("inconclusive: 1.001 vs. base")


def test_junit_of_a_run_has_one_suite_per_release_and_one_for_the_run() -> None:
    root = ElementTree.fromstring(render_junit(run()).encode())
    checks = len(list(release().checks()))
    suites = [(suite.get("name"), len(suite)) for suite in root]
    assert suites == [("03-flowers-17", checks + 1), ("04-oxford_pets", checks + 1), ("run", 5)]
    assert root.get("failures") == "0"


def test_a_run_lists_its_releases_its_own_checks_and_its_recipe() -> None:
    text = render_markdown(run())
    assert text.startswith("# Run of 2 releases: Passed\n")
    assert "| 04-oxford_pets | **✓ Passed** | 3.1e-6 |" in text
    assert "| Release folders |" in text
    assert "- train.iterations: 50" in text
    assert render_html(run()).count("<summary><span>0") == 2


def test_parity_is_shown_next_to_its_control_and_the_smallest_tolerance() -> None:
    report = release()
    assert markdown_row(report, "Max. difference") == "| Max. difference | 4.2e-7 | 2.9e-6 | 3.1e-6 |"
    assert markdown_row(report, "Tolerance") == "| Tolerance | 5.0e-5 | 5.0e-5 | 5.0e-5 |"
    name = "Smallest tolerance that would pass"
    assert markdown_row(report, name) == f"| {name} | 4.2e-7 | 2.9e-6 | 3.1e-6 |"
    assert markdown_row(report, "Control: base model") == "| Control: base model | 3.8e-7 | 2.6e-6 | 2.8e-6 |"


def test_agreement_that_is_not_complete_is_never_rounded_to_100_percent() -> None:
    report = release(parity=replace(release().parity, total=stage(3e-6, 3e-6, top1_agreement=0.999999)))
    assert "99.99 %" in markdown_row(report, "Same top-1 class")


def test_digests_that_differ_are_shown_side_by_side() -> None:
    graph = Rung.judge(["another program"], looked_at=3, of=3, detail="", digest="a" * 64, expected="b" * 64)
    report = release(proof=replace(release().proof, graph=graph))
    assert f"Found `{'a' * 16}`, expected `{'b' * 16}`." in markdown_row(report, "L1 Graph")


def test_all_four_files_are_written_and_nothing_else_is_left(tmp_path: Path) -> None:
    write_report(release(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.md", "report.xml"]
    assert (tmp_path / "report.html").read_text("utf-8") == render_html(release())
    remove_reports(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_cannot_be_written_leaves_the_one_before_as_it_was(tmp_path: Path, monkeypatch) -> None:
    write_report(release(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(release("other"), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
