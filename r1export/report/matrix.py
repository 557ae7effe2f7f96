"""The figures that tables and pictures share: the accuracy matrix and the bytes of a release."""

from collections.abc import Iterable, Mapping
from typing import Any


def matrix_table(accuracy: Mapping[str, Any] | None) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Row names, column names and fractions of the accuracy matrix; empty lists when nothing was measured.

    One row for zero-shot and one after each task learned; one column per task, and a last one for the probe.
    """
    accuracy = accuracy or {}
    tasks = list(accuracy.get("tasks") or [])
    zero_shot, matrix = accuracy.get("zero_shot"), list(accuracy.get("matrix") or [])
    rows = [("zero-shot", zero_shot)] if zero_shot else []
    rows += [(f"after {name}", row or []) for name, row in zip(tasks, matrix, strict=False)]
    if not tasks or not rows:
        return [], [], []
    values = [_filled(row, len(tasks)) for _, row in rows]
    probe = accuracy.get("probe") or {}
    if points := list(probe.get("values") or [])[0 if zero_shot else 1 :]:
        tasks.append(f"{probe.get('name') or 'unnamed'} (probe)")
        values = [[*row, point] for row, point in zip(values, _filled(points, len(rows)), strict=True)]
    return [name for name, _ in rows], tasks, values


def _filled(row: list[float | None], length: int) -> list[float | None]:
    return [*row, *[None] * length][:length]


def in_fp32(reports: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The releases that variants in coarser precision are held against: those whose figures stand for the run."""
    return [r for r in reports if ((r.get("release") or {}).get("precision") or "fp32") == "fp32"]


def weight_bytes(release: Mapping[str, Any] | None) -> int | None:
    """Bytes of the fielded weight files of a release."""
    release = release or {}
    names = set(release.get("weights") or ()) | {"visual.safetensors", "textual.safetensors"}
    found = [count for name, count in (release.get("bytes") or {}).items() if name in names and count is not None]
    return sum(found) or None


def update_bytes(release: Mapping[str, Any] | None) -> int | None:
    """Bytes of the sparse factors that take a device from the release before to this one."""
    return ((release or {}).get("bytes") or {}).get("factors.safetensors")
