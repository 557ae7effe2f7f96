"""What a report says first, of a release or a run: titles, sentences and tables, shared by Markdown and HTML."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from r1export.report.checks import Line
from r1export.report.format import (
    NOT_APPLICABLE,
    NOT_MEASURED,
    interval,
    or_not_applicable,
    percent,
    points,
    ratio,
    scientific,
    share,
    size,
)
from r1export.report.table import Mark, Table, together
from r1export.update.plain_text import printable
from r1export.verify.results import (
    RUNGS,
    Accuracy,
    Latency,
    Parity,
    Ratio,
    ReleaseReport,
    Report,
    RunReport,
    VariantCost,
)

QUESTIONS = {
    "Run": "Every task of the recipe has a release, and every release was verified.",
    "Contents": "Release contents are intact: every file, and every weight equals base + factors.",
    "Parity": "Merge and export preserve the trained model, compared on real samples.",
    "Same graph": "Base and merged release run the identical graph; only the weights differ.",
    "Added latency": "Merged and base model, timed together, are equally fast within the margin.",
    "Control": "The same checks must detect a model with unmerged branches.",
}


def groups(found: Sequence[Line]) -> Table:
    """What was checked: one row per group of checks."""
    parts = {
        "Run": [line for line in found if line.group == "run"],
        "Contents": [line for line in found if line.group == "contents"],
        "Parity": [line for line in found if line.group == "parity"],
        "Same graph": [line for line in found if line.group == "proof" and line.name in RUNGS],
        "Added latency": [line for line in found if line.group == "latency"],
        "Control": [line for line in found if line.key == "proof.control"],
    }
    rows = [[name, QUESTIONS[name], together(line.verdict for line in part)] for name, part in parts.items() if part]
    return Table(["Checks", "A pass means", "Verdict"], rows)


def facts(report: Report) -> list[tuple[str, str, str]]:
    """The headline figures (of a run, those of its worst release): name, figure, reference."""
    fp32 = in_fp32(report.releases) if isinstance(report, RunReport) else [report]
    totals = [r.parity.total for r in fp32 if r.parity.total.max_abs is not None]
    times = [r.latency for r in fp32 if r.latency.ratio is not None]
    return [
        *(_total_fact(max(totals, key=lambda total: total.max_abs or 0)) if totals else []),
        *(_time_fact(max(times, key=lambda time: time.ratio or 0)) if times else []),
        *(_update_fact(fp32[-1]) if fp32 else []),
        *(_accuracy_fact(report.accuracy) if report.accuracy else []),
    ]


def _total_fact(total: Parity) -> list[tuple[str, str, str]]:
    return [("Max. difference", scientific(total.max_abs), f"tolerance {scientific(total.tolerance)}")]


def _time_fact(latency: Latency) -> list[tuple[str, str, str]]:
    return [("Latency vs. base", ratio(latency.ratio), f"95 % interval {interval(latency.ci95)}")]


def _update_fact(report: ReleaseReport) -> list[tuple[str, str, str]]:
    update, weights = report.release.update_bytes, report.release.weight_bytes
    return [("Update", size(update), f"{share(update, weights)} of {size(weights)}")] if update is not None else []


def _accuracy_fact(accuracy: Accuracy) -> list[tuple[str, str, str]]:
    if accuracy.last is None:
        return []
    return [("Accuracy, last", percent(accuracy.last), f"zero-shot {percent(accuracy.zero_shot_avg)}")]


def releases(run: RunReport) -> Table:
    """One row per release of a run."""
    rows = [
        [
            report.name,
            Mark(report.verdict),
            or_not_applicable(report.parity.total, scientific(report.parity.total.max_abs)),
            together(getattr(report.proof, name).verdict for name in RUNGS),
            or_not_applicable(report.latency, ratio(report.latency.ratio)),
            NOT_APPLICABLE if report.release.index == 0 else size(report.release.update_bytes),
        ]
        for report in run.releases
    ]
    return Table(["Release", "Verdict", "Max. difference", "Same graph", "Latency vs. base", "Update"], rows)


def in_fp32(reports: Iterable[ReleaseReport]) -> list[ReleaseReport]:
    """The fp32 releases, whose figures represent the run."""
    return [report for report in reports if report.release.precision == "fp32"]


def variants(reports: Sequence[ReleaseReport]) -> Table | None:
    """One row per fp16 or int8 release: size, latency and accuracy compared with the same release in fp32."""
    rows = [[report.name, *_variant_cells(report.variant)] for report in reports if report.variant]
    columns = [
        "Release",
        "Weights, of fp32",
        "Latency vs. fp32",
        "Accuracy",
        "Accuracy, fp32",
        "Largest drop on a task",
    ]
    return Table(columns, rows) if rows else None


def _variant_cells(variant: VariantCost) -> list[str]:
    weights, reference = sum(variant.bytes.values()), sum(variant.bytes_fp32.values())
    shared = [task for task in variant.accuracy if task in variant.accuracy_fp32]
    lost = max((variant.accuracy_fp32[task] - variant.accuracy[task] for task in shared), default=None)
    speed = "; ".join(f"{provider}: {_speed(times)}" for provider, times in (variant.speed or {}).items())
    means = [
        percent(_mean([accuracy[task] for task in shared])) for accuracy in (variant.accuracy, variant.accuracy_fp32)
    ]
    return [f"{size(weights)}, {share(weights, reference)}", speed or NOT_MEASURED, *means, points(lost)]


def _speed(times: Ratio) -> str:
    """The ratio, and whether the variant is slower or faster on this machine."""
    low, high = times.ci95
    word = "slower" if low > 1 else "faster" if high < 1 else "no difference"
    return f"{ratio(times.ratio)} {word}"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def guards(run: RunReport) -> Table | None:
    """By how much `train.guard` scaled the update of each task down; None if it was not set."""
    rows = [
        [task, f"{guard.scale:.2f}", *(f"{value:.2f}" for value in (guard.kept, guard.whole, guard.limit))]
        for task, guard in run.guards.items()
    ]
    titles = ("Task", "Update scaled by", "Estimated loss, points", "Unscaled, points", "Limit, points")
    return Table(titles, rows) if rows else None


def inputs(run: RunReport) -> Table | None:
    """Changes that decoding made to the images of each task, beyond open_clip's transform; None if there are none."""
    rows = []
    for found in run.inputs:
        counted = f"{found.images}" if found.decoded == found.images else f"{found.images} ({found.decoded} decoded)"
        changes = [f"{count} {change}" for change, count in found.changes.items()]
        rows.append([found.task, counted, "; ".join((*changes, *found.notes))])
    return Table(("Task", "Images", "Changed or skipped"), rows) if any(row[2] for row in rows) else None


def matrix(accuracy: Accuracy) -> tuple[list[str], list[str], list[list[float]]]:
    """Row names, column names and fractions of the accuracy matrix.

    Rows for zero-shot and after each task; columns for each task, and last for the probe.
    """
    tasks = [printable(name) for name in accuracy.tasks]
    rows = ["zero-shot", *(f"after {name}" for name in tasks[: len(accuracy.matrix)])]
    values = [list(accuracy.zero_shot), *map(list, accuracy.matrix)]
    if not accuracy.probe:
        return rows, tasks, values
    with_probe = [[*row, value] for row, value in zip(values, accuracy.probe.values, strict=True)]
    return rows, [*tasks, f"{printable(accuracy.probe.name)} (probe)"], with_probe


def accuracies(accuracy: Accuracy | None) -> Table | None:
    """The accuracy matrix in percent."""
    if accuracy is None:
        return None
    names, columns, values = matrix(accuracy)
    rows = [
        [name, *(percent(value).removesuffix(" %") for value in row)] for name, row in zip(names, values, strict=True)
    ]
    return Table(["Accuracy, %", *columns], rows)


def accuracy_summary(report: Report) -> list[tuple[str, str]]:
    """The usual figures of continual learning, as far as they were measured."""
    accuracy, gaps = report.accuracy, report.gaps
    figures: dict[str, float | None] = {}
    if accuracy:
        figures = {
            "Zero-shot": accuracy.zero_shot_avg,
            "Transfer": accuracy.transfer,
            "Average": accuracy.avg,
            "Last": accuracy.last,
        }
    summary = [(title, percent(value)) for title, value in figures.items() if value is not None]
    if accuracy and accuracy.forgetting:
        summary.append(("Worst forgetting", points(max(accuracy.forgetting))))
    if gaps:
        summary.append(("Merge gap (G1)", scientific(gaps.G1)))
        measured = {"Freezing gap (G2)": gaps.G2, "Shrink gap (G3)": gaps.G3}
        summary += [(title, points(gap)) for title, gap in measured.items() if gap is not None]
    return summary


def settings(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as dotted names and values."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from settings(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(part, Mapping | list | tuple) for part in value):
        for n, part in enumerate(value):
            yield from settings(part, f"{path}[{n}]")
    elif isinstance(value, list | tuple):
        yield path, ", ".join(map(str, value))
    else:
        yield path, "none" if value is None else str(value)
