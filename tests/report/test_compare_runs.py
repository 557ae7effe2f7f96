"""Runs side by side: the same stream, one table, nothing invented."""

import copy
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from r1export.errors import InputError
from r1export.report.compare_runs import cells, compare_runs, render, write_comparison

EXAMPLE = json.loads((Path(__file__).parent / "report_example.json").read_text("utf-8"))
RUN = {"schema": EXAMPLE["schema"], "verdict": "pass", "accuracy": EXAMPLE["accuracy"], "releases": [EXAMPLE]}


def other(**accuracy) -> dict:
    run = copy.deepcopy(RUN)
    run["accuracy"] |= accuracy
    return run


def test_each_run_has_a_row_with_its_own_figures() -> None:
    columns, rows = cells(compare_runs([("ours", RUN), ("baseline", other(last=0.123))]))
    assert [row[0] for row in rows] == ["ours", "baseline"]
    assert rows[1][columns.index("Last")] == "12.3 %"


def test_what_was_not_measured_is_a_dash_and_an_exact_zero_is_not() -> None:
    bare = {"verdict": "inconclusive", "accuracy": {"tasks": RUN["accuracy"]["tasks"], "last": 0.0}, "releases": []}
    columns, rows = cells(compare_runs([("ours", RUN), ("bare", bare)]))
    assert rows[1][columns.index("Last")] == "0.0 %"
    assert rows[1][columns.index("Transfer")] == rows[1][columns.index("Time, to base")] == "-"


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([("one", RUN)], "1 run"),
        ([("one", RUN), ("one", RUN)], "two runs are called one"),
        ([("one", RUN), ("two", other(tasks=["x"]))], "two learned x, one learned"),
        ([("one", RUN), ("release", {"release": {}})], "release: no accuracy in its report"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(runs: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare_runs(runs)


def test_the_page_needs_nothing_else_and_escapes_names() -> None:
    page = render(compare_runs([("<script>alert(1)</script>", RUN), ("two", RUN)]))
    tags: list[tuple[str, dict]] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append((tag, dict(attrs)))
    parser.feed(page)
    assert "script" not in {tag for tag, _ in tags}
    assert not [attrs for _, attrs in tags if str(attrs.get("src") or attrs.get("href") or "#")[0] != "#"]
    assert sum(tag == "svg" for tag, _ in tags) == 1


def test_a_comparison_is_written_once_and_replaced_only_on_demand(tmp_path: Path) -> None:
    found = compare_runs([("a", RUN), ("b", RUN)])
    write_comparison(found, tmp_path / "c")
    assert json.loads((tmp_path / "c" / "comparison.json").read_text()) == found
    with pytest.raises(InputError, match="is already there"):
        write_comparison(found, tmp_path / "c")
    write_comparison(found, tmp_path / "c", overwrite=True)
