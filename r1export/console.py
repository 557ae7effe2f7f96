"""The terminal: progress, tables, errors. The only printer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from r1export.errors import R1ExportError
from r1export.report.checks import LADDER, verdict_of

COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow", "not measured": "dim"}


class Terminal:
    """People read stdout, or stderr where `json` puts a document for machines on stdout."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        """`quiet` says nothing but errors: one of several processes speaks for all."""
        self.as_json = as_json and not quiet
        self.people = Console(stderr=as_json, highlight=False, soft_wrap=False, quiet=quiet)
        self.errors = Console(stderr=True, highlight=False, soft_wrap=True)

    def step(self, title: str) -> None:
        self.people.print(Text(f"• {title}", style="bold"))

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
            bar = progress.add_task(Text(title).plain, total=total, note="")

            def advance(note: str = "") -> None:
                notes.append(note)
                progress.update(bar, advance=1, total=max(total, len(notes)), note=note)

            yield advance
        if not self.people.is_terminal:
            self.say(f"  {title}: {len(notes)} done{', ' + notes[-1] if notes and notes[-1] else ''}")

    def say(self, text: str) -> None:
        """One line for people."""
        self.people.print(Text(text))

    def error(self, error: R1ExportError, exit_code: int) -> None:
        """One line, whatever the width of the terminal, and the same for machines, as the device's kit prints it."""
        self.errors.print(Text.assemble(("Error: ", "bold red"), " ".join(str(error).split())), soft_wrap=True)
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
            table.add_row(*(Text(cell, style=COLOURS.get(cell, "")) for cell in row))
        self.people.print(table)

    def accuracy(self, accuracy: Mapping[str, Any]) -> None:
        """The accuracy matrix, zero-shot first, and its summary."""
        probe = accuracy.get("probe")
        names, matrix = accuracy["tasks"], accuracy.get("matrix") or accuracy["accuracy"]
        rows = [["zero-shot", *map(percent, accuracy["zero_shot"])]]
        rows += [[f"after {names[i]}", *map(percent, row)] for i, row in enumerate(matrix)]
        if probe:
            rows = [[*row, percent(value)] for row, value in zip(rows, probe["values"], strict=True)]
        self.table("Top-1 accuracy, %", ["", *names, *([f"{probe['name']} (probe)"] if probe else [])], rows)
        summary = ", ".join(
            f"{title} {percent(accuracy[key])}"
            for title, key in (("Transfer", "transfer"), ("Avg", "avg"), ("Last", "last"))
            if accuracy.get(key) is not None
        )
        self.say(f"{summary}  (zero-shot {percent(accuracy['zero_shot_avg'])})")

    def report(self, report: Mapping[str, Any]) -> None:
        """Verdicts of all releases and the reasons for what is not a pass."""
        rows = [self._release_row(release) for release in report.get("releases") or [report]]
        self.table(
            "Verification: largest difference, same program, latency / base",
            ["release", "merge", "export", "total", "program", "latency", "unmerged", "verdict"],
            rows,
        )
        for reason in report.get("reasons") or []:
            self.say(f"  {reason}")
        verdict = report["verdict"]
        self.people.print(Text.assemble("Verdict: ", (verdict, f"bold {COLOURS[verdict]}")))

    @staticmethod
    def _release_row(release: Mapping[str, Any]) -> list[str]:
        parity, rungs, timing = release.get("parity") or {}, release.get("proof") or {}, release.get("latency") or {}
        errors = [
            f"{parity[name]['max_abs']:.1e}" if (parity.get(name) or {}).get("max_abs") is not None else "-"
            for name in ("merge", "export", "total")
        ]
        program = _together([rungs.get(name) for name in LADDER])
        ratio = f"{timing['ratio']:.3f}{_half_width(timing.get('ci95'))}" if timing.get("ratio") else "-"
        unmerged = f"{timing['unmerged_ratio']:.2f}" if timing.get("unmerged_ratio") else "-"
        name = (release.get("release") or {}).get("name") or "unnamed"
        return [name, *errors, program, ratio, unmerged, release["verdict"]]


def _half_width(interval: Sequence[float | None] | None) -> str:
    low, high = interval or (None, None)
    return "" if low is None or high is None else f"±{(high - low) / 2:.3f}"


def _together(rungs: Iterable[Mapping[str, Any] | None]) -> str:
    """One verdict for the ladder: fail beats all, a dash unless every rung was measured."""
    verdicts = {verdict_of(rung) for rung in rungs}
    return "fail" if "fail" in verdicts else "pass" if verdicts == {"pass"} else "-"


def percent(share: float) -> str:
    """0.7333 -> 73.3."""
    return f"{100 * share:.1f}"
