"""The terminal: progress, tables, errors. The only printer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from r1export.errors import R1ExportError
from r1export.report.format import NOT_APPLICABLE, or_not_applicable
from r1export.update.plain_text import ERROR, one_line, printable
from r1export.verify.results import (
    RUNGS,
    TITLES,
    UNTIMED,
    Accuracy,
    Check,
    Latency,
    ReleaseReport,
    Report,
    RunReport,
    Verdict,
    combined,
)

if TYPE_CHECKING:
    from r1export.report.compare_runs import Comparison

COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow", "not_applicable": "dim"}


class Terminal:
    """Prints text to stdout, or to stderr if `as_json` reserves stdout for one JSON document."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        """With `quiet` only errors are printed: of several processes, one prints the progress."""
        self.as_json = as_json and not quiet
        self.people = Console(stderr=as_json, highlight=False, soft_wrap=False, quiet=quiet)
        self.errors = Console(stderr=True, highlight=False, soft_wrap=True)

    def step(self, title: str) -> None:
        self.people.print(Text(printable(f"• {title}"), style="bold"))

    @contextmanager
    def track(self, title: str, total: int) -> Iterator[Callable[..., None]]:
        """A progress bar that stays on screen with its last note; a single line if the output isn't a terminal."""
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        notes = []
        with Progress(*columns, console=self.people, disable=not self.people.is_terminal) as progress:
            bar = progress.add_task(escape(printable(title)), total=total, note="")

            def advance(note: str = "", count: int = 1) -> None:
                notes.extend([note] * count)
                progress.update(bar, advance=count, total=max(total, len(notes)), note=escape(printable(note)))

            yield advance
        if not self.people.is_terminal:
            self.say(f"  {title}: {len(notes)} done{', ' + notes[-1] if notes and notes[-1] else ''}")

    def say(self, text: str) -> None:
        """Print one line."""
        self.people.print(Text(printable(text)))

    def error(self, error: R1ExportError, exit_code: int) -> None:
        """Print an error as one line to stderr, and as the JSON document. The device kit prints the same."""
        self.errors.print(Text.assemble((ERROR, "bold red"), one_line(str(error))), soft_wrap=True)
        self.document({"error": {"message": error.message, "remedy": error.remedy}, "exit_code": exit_code})

    def document(self, value: Any) -> None:
        """The one JSON document on stdout."""
        if self.as_json:
            print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))

    def line(self, value: Any) -> None:
        """Print a JSON document on one line of stdout and flush: for a command that keeps running."""
        if self.as_json:
            print(json.dumps(value, ensure_ascii=False, allow_nan=False), flush=True)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """First column to the left, the others to the right."""
        table = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            padding=0,
            pad_edge=False,
            show_edge=False,
        )
        for i, column in enumerate(columns):
            table.add_column(
                column, justify="left" if i == 0 else "right", overflow="fold", no_wrap=i > 0 and len(columns) > 3
            )
        for row in rows:
            table.add_row(*(Text(printable(cell), style=COLOURS.get(cell, "")) for cell in row))
        self.people.print(table)

    def accuracy(self, accuracy: Accuracy) -> None:
        """The accuracy matrix, zero-shot first, and its summary."""
        from r1export.report.summary import matrix

        names, columns, values = matrix(accuracy)
        rows = [[name, *map(_percent, row)] for name, row in zip(names, values, strict=True)]
        self.table("Top-1 accuracy, %", ["", *columns], rows)
        figures = {"Transfer": accuracy.transfer, "Avg": accuracy.avg, "Last": accuracy.last}
        summary = ", ".join(f"{title} {_percent(value)}" for title, value in figures.items() if value is not None)
        if accuracy.zero_shot_avg is not None:
            summary += f"  (zero-shot {_percent(accuracy.zero_shot_avg)})"
        self.say(summary)

    def report(self, report: Report) -> None:
        """The verdict of each release, and the reasons for every verdict other than a pass."""
        releases = report.releases if isinstance(report, RunReport) else (report,)
        self.table(
            "Verification (max abs. difference, same graph, latency vs. base)",
            ["release", "merge", "export", "total", "graph", "latency", "unmerged", "verdict"],
            [_release_row(release) for release in releases],
        )
        for reason in report.reasons:
            self.say(f"  {reason}")
        for line in _not_applicable(report) if isinstance(report, ReleaseReport) else ():
            self.say(f"  {line}")
        limits = "; ".join(_limits(report, releases))
        rest = f" ({limits})" if limits else ""
        self.people.print(Text.assemble("Verdict: ", (report.verdict, f"bold {COLOURS[report.verdict]}"), rest))

    def comparison(self, comparison: Comparison) -> None:
        """One row per run; a dash for values that were not measured."""
        from r1export.report import compare_runs
        from r1export.report.format import NOT_MEASURED

        shown = compare_runs.table(comparison)
        rows = [[getattr(cell, "verdict", "-" if cell == NOT_MEASURED else cell) for cell in row] for row in shown.rows]
        self.table("Runs", list(shown.columns), rows)


def _limits(report: Report, releases: Sequence[ReleaseReport]) -> Iterator[str]:
    """What the user asked to leave out, which the verdict doesn't cover."""
    if isinstance(report, RunReport) and report.contents.releases.verdict is Verdict.NOT_APPLICABLE:
        yield report.contents.releases.detail
    if any(release.latency.detail == UNTIMED for release in releases):
        yield "latency not measured: --no-latency"


def _release_row(report: ReleaseReport) -> list[str]:
    stages, latency = (report.parity.merge, report.parity.export, report.parity.total), report.latency
    errors = [_figure(stage, None if stage.max_abs is None else f"{stage.max_abs:.1e}") for stage in stages]
    graph = combined(getattr(report.proof, name).verdict for name in RUNGS)
    ratio = _figure(latency, None if latency.ratio is None else f"{latency.ratio:.3f}{_half_width(latency)}")
    unmerged = None if latency.unmerged_ratio is None else f"{latency.unmerged_ratio:.2f}"
    shown = {Verdict.INCONCLUSIVE: "-", Verdict.NOT_APPLICABLE: "n/a"}.get(graph, graph.value)
    return [report.name, *errors, shown, ratio, _figure(report.proof.control, unmerged), report.verdict]


def _figure(check: Check, figure: str | None) -> str:
    """The figure of a check; a dash if there is none, n/a if the check does not apply."""
    shown = or_not_applicable(check, figure or "-")
    return "n/a" if shown == NOT_APPLICABLE else shown


def _not_applicable(report: ReleaseReport) -> Iterator[str]:
    """The checks that do not apply, by reason."""
    titles: dict[str, list[str]] = {}
    for key, check in report.checks():
        if check.verdict is Verdict.NOT_APPLICABLE and check.detail != UNTIMED:
            titles.setdefault(check.detail, []).append(TITLES[key])
    for reason, named in titles.items():
        yield f"Not applicable: {', '.join(named)} ({reason})"


def _half_width(latency: Latency) -> str:
    return f"±{(latency.ci95[1] - latency.ci95[0]) / 2:.3f}" if latency.ci95 else ""


def _percent(share: float) -> str:
    """0.7333 -> 73.3."""
    return f"{100 * share:.1f}"
