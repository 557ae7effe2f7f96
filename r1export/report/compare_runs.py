"""Several runs in one table and one picture: a method against its baselines, on the same stream of tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from r1export.errors import InputError
from r1export.report.checks import verdict_of
from r1export.report.format import NOT_MEASURED, percent, points, ratio, scientific, size
from r1export.report.matrix import in_fp32, update_bytes
from r1export.report.svg import DASHES, SERIES, page_svg, style
from r1export.report.tables import Table, Verdict
from r1export.report.templating import environment
from r1export.update.atomic_io import new_folder

SCHEMA = "r1export.comparison/1"


def compare_runs(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """One comparison of (name, report of a run), as plain JSON values.

    Raises InputError: fewer than two runs, two of one name, a report that is not of a run, or other tasks.
    """
    if len(runs) < 2:
        raise InputError(f"{len(runs)} run(s) to compare", "give two or more")
    names = [name for name, _ in runs]
    if len(set(names)) < len(names):
        raise InputError(
            f"two runs are called {next(name for name in names if names.count(name) > 1)}", "rename a folder"
        )
    for name, report in runs:
        if not (report.get("accuracy") or {}).get("tasks"):
            raise InputError(f"{name}: no accuracy in its report", "give the folder of a verified run")
    tasks = runs[0][1]["accuracy"]["tasks"]
    for name, report in runs:
        if report["accuracy"]["tasks"] != tasks:
            raise InputError(
                f"{name} learned {', '.join(report['accuracy']['tasks'])}, {names[0]} learned {', '.join(tasks)}",
                "compare runs of one stream",
            )
    return {"schema": SCHEMA, "tasks": tasks, "runs": [_facts(name, report) for name, report in runs]}


def _facts(name: str, report: Mapping[str, Any]) -> dict[str, Any]:
    accuracy, releases = report["accuracy"], in_fp32(report.get("releases") or [])
    errors = [
        total["max_abs"]
        for r in releases
        if (total := (r.get("parity") or {}).get("total") or {}).get("max_abs") is not None
    ]
    ratios = [time["ratio"] for r in releases if (time := r.get("latency") or {}).get("ratio") is not None]
    updates = [count for r in releases if (count := update_bytes(r.get("release"))) is not None]
    lost = [value for value in accuracy.get("forgetting") or [] if value is not None]
    probe = ((accuracy.get("probe") or {}).get("values") or [None])[-1]
    gaps = accuracy.get("gaps") or {}
    return {
        "name": name, "verdict": verdict_of(report), "zero_shot": accuracy.get("zero_shot_avg"), "transfer": accuracy.get("transfer"),
        "avg": accuracy.get("avg"), "last": accuracy.get("last"), "worst_forgetting": max(lost, default=None), "probe_last": probe,
        "G2": gaps.get("G2"), "G3": gaps.get("G3"), "update_bytes": sum(updates) if updates else None,
        "max_abs": max(errors, default=None), "latency_ratio": max(ratios, default=None),
        "mean_after": [sum(row) / len(row) for row in [accuracy.get("zero_shot") or [], *(accuracy.get("matrix") or [])] if row],
    }  # fmt: skip


def table(comparison: Mapping[str, Any]) -> Table:
    """One row per run."""
    columns = [
        "Run",
        "Verdict",
        "Transfer",
        "Average",
        "Last",
        "Worst forgetting",
        "Probe",
        "Updates",
        "Largest difference",
        "Time, to base",
    ]
    rows = [
        [
            run["name"], Verdict(run["verdict"]), percent(run["transfer"]), percent(run["avg"]), percent(run["last"]), points(run["worst_forgetting"]),
            percent(run["probe_last"]), size(run["update_bytes"]), scientific(run["max_abs"]), ratio(run["latency_ratio"]),
        ]
        for run in comparison["runs"]
    ]  # fmt: skip
    return Table(columns, rows)


def cells(comparison: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The same table as text, for the terminal; what was not measured is a dash."""
    found = table(comparison)
    return list(found.columns), [
        [cell.verdict if isinstance(cell, Verdict) else "-" if cell == NOT_MEASURED else cell for cell in row]
        for row in found.rows
    ]


def picture(comparison: Mapping[str, Any]) -> str:
    """Mean accuracy over all tasks, zero-shot and after each task, one line per run."""
    ticks = ["zero-shot", *(f"after {task}" for task in comparison["tasks"])]
    with style("comparison"):
        figure = Figure(figsize=(6.0, 3.2), layout="constrained")
        axes = figure.subplots()
        for n, run in enumerate(comparison["runs"]):
            values = [100 * value for value in run["mean_after"]]
            colour, dash = SERIES[n % len(SERIES)], DASHES[n // len(SERIES) % len(DASHES)]
            axes.plot(
                range(len(values)), values, color=colour, linestyle=dash, marker="o", markersize=4, label=run["name"]
            )
        axes.set_xticks(range(len(ticks)), ticks, rotation=20, ha="right")
        axes.set(ylabel="mean accuracy over all tasks, %")
        axes.legend(fontsize=9)
        facts = "; ".join(f"{run['name']} {percent(run['last'])}" for run in comparison["runs"])
        return page_svg(figure, "comparison", f"Mean accuracy after each task. Last: {facts}.")


def render(comparison: Mapping[str, Any]) -> str:
    """One page that needs nothing else."""
    return (
        environment("html")
        .get_template("comparison.html.j2")
        .render(table=table(comparison), tasks=comparison["tasks"], picture=Markup(picture(comparison)))
    )


def write_comparison(comparison: Mapping[str, Any], folder: Path, *, overwrite: bool = False) -> None:
    """Write comparison.json and comparison.html into a new folder. Raises InputError if it is there and may not be replaced."""
    if folder.exists() and not overwrite:
        raise InputError(f"{folder} is already there", "choose another --out, or --overwrite")
    with new_folder(folder) as place:
        (place / "comparison.json").write_text(
            json.dumps(comparison, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )
        (place / "comparison.html").write_text(render(comparison), encoding="utf-8", newline="\n")
