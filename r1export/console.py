"""The terminal: progress, tables, errors. The only printer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from r1export.errors import R1ExportError
from r1export.update.plain_text import printable
from r1export.verify.results import UNTIMED, Accuracy, Latency, ReleaseReport, Report, RunReport, Verdict

if TYPE_CHECKING:
    from r1export.report.compare_runs import Comparison

COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow", "not_applicable": "dim"}


class Terminal:
    """People read stdout, or stderr where `json` puts a document for machines on stdout."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        """`quiet` says nothing but errors: one of several processes speaks for all."""
        self.as_json = as_json and not quiet
        self.people = Console(stderr=as_json, highlight=False, soft_wrap=False, quiet=quiet)
        self.errors = Console(stderr=True, highlight=False, soft_wrap=True)

    def step(self, title: str) -> None:
        self.people.print(Text(printable(f"• {title}"), style="bold"))

    @contextmanager
    def track(self, title: str, total: int) -> Iterator[Callable[..., None]]:
        """A bar that stays on the screen with its last note; one line where the output is no terminal."""
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
        """One line for people."""
        self.people.print(Text(printable(text)))

    def error(self, error: R1ExportError, exit_code: int) -> None:
        """One line, whatever the width of the terminal, and the same for machines, as the device's kit prints it."""
        self.errors.print(
            Text.assemble(("Error: ", "bold red"), printable(" ".join(str(error).split()))), soft_wrap=True
        )
        self.document({"error": {"message": error.message, "remedy": error.remedy}, "exit_code": exit_code})

    def document(self, value: Any) -> None:
        """The one JSON document on stdout."""
        if self.as_json:
            print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))

    def line(self, value: Any) -> None:
        """One JSON document on one line of stdout, at once: for a command that goes on."""
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
        from r1export.report.tables import matrix

        names, columns, values = matrix(accuracy)
        rows = [[name, *map(_percent, row)] for name, row in zip(names, values, strict=True)]
        self.table("Top-1 accuracy, %", ["", *columns], rows)
        figures = {"Transfer": accuracy.transfer, "Avg": accuracy.avg, "Last": accuracy.last}
        summary = ", ".join(f"{title} {_percent(value)}" for title, value in figures.items() if value is not None)
        if accuracy.zero_shot_avg is not None:
            summary += f"  (zero-shot {_percent(accuracy.zero_shot_avg)})"
        self.say(summary)

    def report(self, report: Report) -> None:
        """Verdicts of all releases and the reasons for what is not a pass."""
        releases = report.releases if isinstance(report, RunReport) else (report,)
        self.table(
            "Verification (max. difference, same program, latency vs. base)",
            ["release", "merge", "export", "total", "program", "latency", "unmerged", "verdict"],
            [_release_row(release) for release in releases],
        )
        for reason in report.reasons:
            self.say(f"  {reason}")
        untimed = any(release.latency.detail == UNTIMED for release in releases)
        rest = ", of all checks but latency (--no-latency)" if untimed else ""
        self.people.print(Text.assemble("Verdict: ", (report.verdict, f"bold {COLOURS[report.verdict]}"), rest))

    def comparison(self, comparison: Comparison) -> None:
        """One row per run; what was not measured is a dash."""
        from r1export.report import compare_runs
        from r1export.report.format import NOT_MEASURED

        shown = compare_runs.table(comparison)
        rows = [[getattr(cell, "verdict", "-" if cell == NOT_MEASURED else cell) for cell in row] for row in shown.rows]
        self.table("Runs", list(shown.columns), rows)


def _release_row(report: ReleaseReport) -> list[str]:
    stages, latency = (report.parity.merge, report.parity.export, report.parity.total), report.latency
    errors = ["-" if stage.max_abs is None else f"{stage.max_abs:.1e}" for stage in stages]
    program = report.proof.verdict
    ratio = "-" if latency.ratio is None else f"{latency.ratio:.3f}{_half_width(latency)}"
    unmerged = "-" if latency.unmerged_ratio is None else f"{latency.unmerged_ratio:.2f}"
    return [report.name, *errors, "-" if program is Verdict.INCONCLUSIVE else program, ratio, unmerged, report.verdict]


def _half_width(latency: Latency) -> str:
    return f"±{(latency.ci95[1] - latency.ci95[0]) / 2:.3f}" if latency.ci95 else ""


def _percent(share: float) -> str:
    """0.7333 -> 73.3."""
    return f"{100 * share:.1f}"
