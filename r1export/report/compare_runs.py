"""Compare runs, e.g. a method and its baselines, on the same sequence of tasks: one table and one plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from r1export.errors import InputError
from r1export.report.format import percent, points, ratio, scientific, size
from r1export.report.summary import in_fp32
from r1export.report.svg import DASHES, SERIES, page_svg, style
from r1export.report.table import Mark, Table
from r1export.report.write import environment
from r1export.update.atomic_io import new_folder
from r1export.verify.results import RunReport, Verdict

SCHEMA = "r1export.comparison/1"


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """The key figures of one run. `mean_after`: mean accuracy over all tasks, zero-shot and after each task."""

    name: str
    verdict: Verdict
    zero_shot: float | None
    transfer: float | None
    avg: float | None
    last: float | None
    worst_forgetting: float | None
    probe_last: float | None
    G2: float | None
    G3: float | None
    update_bytes: int | None
    max_abs: float | None
    latency_ratio: float | None
    mean_after: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """Runs of the same tasks, in the given order."""

    tasks: tuple[str, ...]
    runs: tuple[RunFigures, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of all runs."""
        order = (Verdict.FAIL, Verdict.INCONCLUSIVE)
        return next((verdict for verdict in order if verdict in {run.verdict for run in self.runs}), Verdict.PASS)

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **json.loads(json.dumps(asdict(self)))}


def compare_runs(runs: Sequence[tuple[str, RunReport]]) -> Comparison:
    """One comparison of (name, report of a run).

    Raises InputError for fewer than two runs, two with the same name, or different tasks.
    """
    if len(runs) < 2:
        raise InputError(f"{len(runs)} run(s) to compare, expected two or more", "pass the folders of the runs")
    names = [name for name, _ in runs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"two runs are named {twice}", "rename one of the folders")
    tasks = runs[0][1].accuracy.tasks
    for name, report in runs:
        if report.accuracy.tasks != tasks:
            raise InputError(
                f"{name} has the tasks {', '.join(report.accuracy.tasks)}, {names[0]} has {', '.join(tasks)}",
                "compare runs of the same tasks in the same order",
            )
    return Comparison(tasks, tuple(_figures(name, report) for name, report in runs))


def _figures(name: str, report: RunReport) -> RunFigures:
    accuracy, releases = report.accuracy, in_fp32(report.releases)
    errors = [r.parity.total.max_abs for r in releases if r.parity.total.max_abs is not None]
    ratios = [r.latency.ratio for r in releases if r.latency.ratio is not None]
    updates = [r.release.update_bytes for r in releases if r.release.update_bytes is not None]
    return RunFigures(
        name=name,
        verdict=report.verdict,
        zero_shot=accuracy.zero_shot_avg,
        transfer=accuracy.transfer,
        avg=accuracy.avg,
        last=accuracy.last,
        worst_forgetting=max(accuracy.forgetting, default=None),
        probe_last=accuracy.probe.values[-1] if accuracy.probe else None,
        G2=report.gaps.G2 if report.gaps else None,
        G3=report.gaps.G3 if report.gaps else None,
        update_bytes=sum(updates) if updates else None,
        max_abs=max(errors, default=None),
        latency_ratio=max(ratios, default=None),
        mean_after=tuple(sum(row) / len(row) for row in (accuracy.zero_shot, *accuracy.matrix)),
    )


COLUMNS = (
    "Run", "Verdict", "Transfer", "Average", "Last", "Worst forgetting", "Probe", "Updates", "Max. difference", "Latency vs. base",
)  # fmt: skip


def table(comparison: Comparison) -> Table:
    """One row per run."""
    return Table(COLUMNS, [[run.name, Mark(run.verdict), *_cells(run)] for run in comparison.runs])


def _cells(run: RunFigures) -> list[str]:
    accuracies = [percent(run.transfer), percent(run.avg), percent(run.last), points(run.worst_forgetting)]
    return [
        *accuracies,
        percent(run.probe_last),
        size(run.update_bytes),
        scientific(run.max_abs),
        ratio(run.latency_ratio),
    ]


def picture(comparison: Comparison) -> str:
    """Mean accuracy over all tasks, zero-shot and after each task, one line per run."""
    ticks = ["zero-shot", *(f"after {task}" for task in comparison.tasks)]
    with style("comparison"):
        figure = Figure(figsize=(6.0, 3.2), layout="constrained")
        axes = figure.subplots()
        for n, run in enumerate(comparison.runs):
            values = [100 * value for value in run.mean_after]
            colour, dash = SERIES[n % len(SERIES)], DASHES[n // len(SERIES) % len(DASHES)]
            axes.plot(
                range(len(values)), values, color=colour, linestyle=dash, marker="o", markersize=4, label=run.name
            )
        axes.set_xticks(range(len(ticks)), ticks, rotation=20, ha="right")
        axes.set(ylabel="mean accuracy over all tasks, %")
        axes.legend(fontsize=9)
        facts = "; ".join(f"{run.name} {percent(run.last)}" for run in comparison.runs)
        return page_svg(figure, "comparison", f"Mean accuracy after each task. Last: {facts}.")


def render(comparison: Comparison) -> str:
    """One self-contained page."""
    template = environment("html").get_template("comparison.html.j2")
    return template.render(table=table(comparison), tasks=comparison.tasks, picture=Markup(picture(comparison)))


def write_comparison(comparison: Comparison, folder: Path, *, overwrite: bool = False) -> None:
    """Write comparison.json and comparison.html to a new folder. Raises InputError if it exists and `overwrite` is not set."""
    if folder.exists() and not overwrite:
        raise InputError(f"{folder} exists", "choose another --out, or use --overwrite")
    document = json.dumps(comparison.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with new_folder(folder) as place:
        (place / "comparison.json").write_text(document, encoding="utf-8")
        (place / "comparison.html").write_text(render(comparison), encoding="utf-8", newline="\n")
