"""Runs side by side: the same stream, one table, nothing invented."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report.examples import accuracy, release, run

from r1export.errors import InputError
from r1export.report.compare_runs import COLUMNS, compare_runs, render, table, write_comparison
from r1export.report.format import NOT_MEASURED
from r1export.verify.results import Latency, RunReport

RUN = run()


def other(**changes) -> RunReport:
    return run(accuracy=accuracy(**changes))


def test_each_run_has_a_row_with_its_own_figures() -> None:
    rows = table(compare_runs([("ours", RUN), ("baseline", other(last=0.123))])).rows
    assert [row[0] for row in rows] == ["ours", "baseline"]
    assert rows[1][COLUMNS.index("Last")] == "12.3 %"


def test_what_was_not_measured_is_said_and_an_exact_zero_is_shown() -> None:
    bare = run(release(latency=Latency.unmeasured("busy")), accuracy=accuracy(last=0.0, transfer=None))
    row = table(compare_runs([("ours", RUN), ("bare", bare)])).rows[1]
    assert row[COLUMNS.index("Last")] == "0.0 %"
    assert row[COLUMNS.index("Transfer")] == row[COLUMNS.index("Latency vs. base")] == NOT_MEASURED


def test_a_comparison_is_no_better_than_its_worst_run() -> None:
    bare = run(release(latency=Latency.unmeasured("busy")))
    assert compare_runs([("a", RUN), ("b", RUN)]).verdict == "pass"
    assert compare_runs([("a", RUN), ("b", bare)]).verdict == "inconclusive"


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([("one", RUN)], "1 run"),
        ([("one", RUN), ("one", RUN)], "two runs are named one"),
        ([("one", RUN), ("two", other(tasks=("x",)))], "two has the tasks x, one has"),
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
    assert json.loads((tmp_path / "c" / "comparison.json").read_text()) == found.to_json()
    with pytest.raises(InputError, match="exists"):
        write_comparison(found, tmp_path / "c")
    write_comparison(found, tmp_path / "c", overwrite=True)
