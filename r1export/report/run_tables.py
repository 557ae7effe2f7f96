"""What the report of a whole run says beside that of one release."""

from collections.abc import Mapping, Sequence
from typing import Any

from r1export.report.checks import LADDER, checks, verdict_of
from r1export.report.format import NOT_MEASURED, percent, points, ratio, scientific, share, size
from r1export.report.matrix import in_fp32, update_bytes
from r1export.report.tables import Table, Verdict, together


def worst(run: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a run as if it were one release: the largest difference, the slowest ratio, the last update."""
    reports = in_fp32(run["releases"])
    totals = [
        total
        for report in reports
        if (total := (report.get("parity") or {}).get("total") or {}).get("max_abs") is not None
    ]
    times = [time for report in reports if (time := report.get("latency") or {}).get("ratio") is not None]
    return {
        "parity": {"total": max(totals, key=lambda total: total["max_abs"], default=None)},
        "latency": max(times, key=lambda time: time["ratio"], default=None),
        "release": reports[-1].get("release") if reports else None,
        "accuracy": run.get("accuracy"),
    }


def releases(run: Mapping[str, Any]) -> Table:
    """One row per release of a run."""
    rows = []
    for report in run["releases"]:
        release, found = report.get("release") or {}, checks(report)
        total, latency = (report.get("parity") or {}).get("total") or {}, report.get("latency") or {}
        program = together([check for check in found if check.key in LADDER])
        rows.append(
            [
                release.get("name") or "unnamed",
                Verdict(verdict_of(report)),
                scientific(total.get("max_abs")),
                program,
                ratio(latency.get("ratio")),
                size(update_bytes(release)),
            ]
        )
    return Table(["Release", "Verdict", "Largest difference", "Same program", "Time, to base", "Update"], rows)


def variants(reports: Sequence[Mapping[str, Any]]) -> Table | None:
    """One row per release in a coarser precision: what it saves and what it costs against the same release in fp32."""
    rows = []
    for report in reports:
        if not (variant := report.get("variant")):
            continue
        bytes_, single = (sum((variant.get(key) or {}).values()) for key in ("bytes", "bytes_fp32"))
        accuracy, accuracy_fp32 = variant.get("accuracy") or {}, variant.get("accuracy_fp32") or {}
        shared = [task for task in accuracy if None not in (accuracy[task], accuracy_fp32.get(task))]
        lost = max((accuracy_fp32[task] - accuracy[task] for task in shared), default=None)
        rows.append(
            [
                (report.get("release") or {}).get("name") or "unnamed",
                f"{size(bytes_)}, {share(bytes_, single)}",
                _speed(variant.get("speed") or {}),
                percent(_mean([accuracy[task] for task in shared])),
                percent(_mean([accuracy_fp32[task] for task in shared])),
                points(lost),
            ]
        )
    columns = ["Release", "Weights, of fp32", "Time, to fp32", "Accuracy", "Accuracy, fp32", "Most lost on a task"]
    return Table(columns, rows) if rows else None


def _speed(speed: Mapping[str, Any]) -> str:
    """The ratio on every provider, and in words whether the variant is slower on this machine."""
    found = []
    for provider, times in speed.items():
        low, high = times.get("ci95") or (None, None)
        word = (
            "" if low is None or high is None else " slower" if low > 1 else " faster" if high < 1 else " no difference"
        )
        found.append(f"{provider}: {ratio(times.get('ratio'))}{word}")
    return "; ".join(found) or NOT_MEASURED


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
