"""Tables of strings and marks, which Markdown and HTML write alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from r1export.report.checks import Line
from r1export.verify.results import (
    Verdict,
    combined,
)


@dataclass(frozen=True)
class Table:
    """Cells are text or a `Mark`. The first column names the row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Mark:
    """A cell with a verdict as a mark and a word, followed by the evidence."""

    verdict: Verdict
    evidence: str = ""


def together(verdicts: Iterable[Verdict]) -> Mark:
    """The verdict of several checks; not applicable if none of them applies."""
    return Mark(combined(verdicts))


def check_table(found: Sequence[Line], first: str) -> Table:
    """One row per check: what it shows, its verdict and its evidence."""
    rows = [[line.title, line.shows, Mark(line.verdict, line.evidence)] for line in found]
    return Table([first, "Shows", "Verdict and evidence"], rows)
