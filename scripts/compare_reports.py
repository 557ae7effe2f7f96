"""Compare the reports of two versions of r1export on one run, in all figures except times.

    python scripts/compare_reports.py BEFORE/report.json AFTER/report.json

Reads reports of the formats 1 and 2. Prints a table of what differs and ends with 1 if anything does. Not compared are times,
machines, and what only one of the formats has: looked_at, of and details, whose words changed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TIMES = ("latency", "created", "environment", "speed", "reasons", "schema", "r1export")
WORDS = (
    "detail",
    "looked_at",
    "of",
    "providers",
    "levels",
    "batches",
    "digest",
    "expected",
    "p99_abs",
    "edges",
    "by_provider",
)
OPTIONAL: tuple[object, ...] = (None, "not measured", "not_applicable", [], {}, 0)  # what the formats write for nothing


def figures(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(place, figure) of all that is compared."""
    if isinstance(value, dict):
        for key, part in value.items():
            if key not in TIMES + WORDS:
                yield from figures(part, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for n, part in enumerate(value):
            yield from figures(part, f"{path}[{n}]")
    elif value not in OPTIONAL:
        yield path, value


def as_format_2(report: dict[str, Any]) -> dict[str, Any]:
    """A report with the places of format 2."""
    for release in report.get("releases", []):
        as_format_2(release)
    accuracy = report.get("accuracy") or {}
    if gaps := accuracy.pop("gaps", None):
        report["gaps"] = gaps
    proof = report.get("proof") or {}
    if unmerged := (proof.get("control") or {}).pop("unmerged", None):
        proof["control"] = {"verdict": "pass" if unmerged["detected"] else "fail"}
    return report


def common(before: dict[str, Any], after: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """What differs at the places that both have, and the places that only the report before has."""
    differing = {
        place: (before[place], after[place]) for place in before.keys() & after.keys() if before[place] != after[place]
    }
    return differing, before.keys() - after.keys()


def main(before: Path, after: Path) -> int:
    documents = [as_format_2(json.loads(path.read_text("utf-8"))) for path in (before, after)]
    left, right = (dict(figures(document)) for document in documents)
    differing, gone = common(left, right)
    for place, (old, new) in sorted(differing.items()):
        print(f"| {place} | {old} | {new} |")
    for place in sorted(gone):
        print(f"| {place} | {left[place]} | gone |")
    print(f"{len(left.keys() & right.keys())} figures compared, {len(differing)} differ, {len(gone)} are gone")
    return 1 if differing or gone else 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:3])))
