"""The content of a report as titles, sentences and tables of strings, shared by Markdown and HTML."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from r1export.report.checks import Line, label, lines
from r1export.report.format import (
    NOT_APPLICABLE,
    NOT_MEASURED,
    cosine,
    interval,
    milliseconds,
    or_not_applicable,
    percent,
    points,
    ratio,
    scientific,
    share,
    size,
)
from r1export.update.plain_text import printable
from r1export.verify.results import (
    PARITY_STAGES,
    RUNGS,
    TITLES,
    Accuracy,
    Agreement,
    Difference,
    Drift,
    Flip,
    Latency,
    Parity,
    Ratio,
    ReleaseReport,
    Report,
    RunReport,
    Sensitivity,
    Times,
    VariantCost,
    Verdict,
    combined,
)  # fmt: skip

MODELS = {
    "routed_torch": "torch, unmerged (routed)",
    "unmerged_torch": "torch, unmerged (frozen)",
    "merged_torch": "torch, merged",
    "base": "ONNX, base",
    "merged": "ONNX, merged",
    "unmerged": "ONNX, unmerged (branches)",
}
QUESTIONS = {
    "Run": "Every task of the recipe has a release, and every release was verified.",
    "Contents": "Release contents are intact: every file, and every weight equals base + factors.",
    "Parity": "Merge and export preserve the trained model, compared on real samples.",
    "Same graph": "Base and merged release run the identical graph; only the weights differ.",
    "Added latency": "Merged and base model, timed in interleaved pairs, are equally fast within the margin.",
    "Control": "The same checks must detect a model with unmerged branches.",
}
FLIPS = 10  # listed changes per stage
ROWS: dict[str, Callable[[Parity], str]] = {
    "Max. difference": lambda p: scientific(p.max_abs),
    "Tolerance": lambda p: scientific(p.tolerance),
    "Smallest tolerance that would pass": lambda p: scientific(p.least_tolerance),
    "Control: base model": lambda p: scientific(p.control.max_abs if p.control else None),
    "99th percentile": lambda p: scientific(p.p99_abs),
    "Lowest cosine": lambda p: cosine(p.min_cosine),
    "Cosine required": lambda p: cosine(p.min_cosine_required),
    "Lowest cosine, base model": lambda p: cosine(p.control.min_cosine if p.control else None),
    "Same top-1 class": lambda p: percent(p.top1_agreement, 2),
    "Samples": lambda p: f"{p.looked_at} of {p.of}" if p.of else NOT_MEASURED,
    "Batch sizes": lambda p: ", ".join(map(str, p.batches)) or NOT_MEASURED,
    "Graph optimization": lambda p: ", ".join(p.levels) or NOT_MEASURED,
}


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


def together(verdicts: Iterable[Verdict]) -> Mark:
    """The verdict of several checks; not applicable if none of them applies."""
    return Mark(combined(verdicts))


def check_table(found: Sequence[Line], first: str) -> Table:
    """One row per check: what it shows, its verdict and its evidence."""
    rows = [[line.title, line.shows, Mark(line.verdict, line.evidence)] for line in found]
    return Table([first, "Shows", "Verdict and evidence"], rows)


def contents(report: ReleaseReport) -> Table:
    return check_table([line for line in lines(report) if line.group == "contents"], "Part")


def ladder(report: ReleaseReport) -> Table:
    """The rungs L0 to L5 and the control."""
    return check_table([line for line in lines(report) if line.group in ("proof", "latency")], "Rung")


def sensitivity(found: Sensitivity | None) -> str:
    """The smallest change that the golden samples detect, in one sentence; empty if it was not measured."""
    if found is None:
        return ""
    change = (
        f"of {scientific(found.relative_change)} or more"
        if found.relative_change
        else f"not even of {scientific(found.largest_tried)}"
    )
    return (
        f"Sensitivity: the golden samples detect a relative change {change} in all values of {found.parameter}. "
        "Only a verification of the run detects smaller changes."
    )


def drift(found: Sequence[Drift]) -> Table | None:
    """Whether vectors that were computed with an earlier release can be kept."""
    if not found:
        return None
    rows = [
        [
            one.against,
            one.reindex,
            str(one.images),
            f"{cosine(one.mean_cosine)} ({cosine(one.min_cosine)})",
            _agreement(one.new_queries),
            _agreement(one.old_queries),
        ]
        for one in found
    ]
    columns = [
        "Earlier release",
        "Re-index",
        "Images",
        "Mean (lowest) cosine",
        "New queries, old vectors",
        "Old queries, new vectors",
    ]
    return Table(columns, rows)


def _agreement(found: Agreement) -> str:
    """Top-1 and recall at 10, if there were enough images."""
    shares = (("top-1", found.top1), ("of 10", found.recall_at_10))
    return ", ".join(f"{name} {percent(share)}" for name, share in shares if share is not None) or "too few images"


def timings(latency: Latency) -> Table | None:
    """Median and p90 of every model, provider and batch, with the ratio to the base model."""
    rows = [
        [name, label(provider), batch, *_times(models[key], models["base"])]
        for provider, batches in (latency.providers or {}).items()
        for batch, models in batches.items()
        for key, name in MODELS.items()
        if key in models
    ]
    return Table(["Model", "Provider", "Batch", "Median, ms", "p90, ms", "vs. base", "Runs"], rows) if rows else None


def clocks(latency: Latency) -> Table | None:
    """Every clock of every provider: base, merged and unmerged vs. base, and which clock decides."""
    rows = [
        [
            f"{clock}, {'all threads' if not one.threads else 'one thread'}",
            label(provider),
            *(_with_interval(part) for part in (one.noise, one.merged, one.unmerged)),
            str(one.pairs),
            "yes" if clock == found.clock else "no",
        ]
        for provider, found in (latency.by_provider or {}).items()
        for clock, one in (found.clocks or {}).items()
    ]
    columns = ["Clock", "Provider", "Base vs. base", "Merged", "Unmerged", "Runs", "Decides"]
    return Table(columns, rows) if rows else None


def _with_interval(found: Ratio | None) -> str:
    return NOT_MEASURED if found is None else f"{ratio(found.ratio)} ({interval(found.ci95)})"


def _times(times: Times, base: Times) -> list[str]:
    vs_base = f"{times.median_ms / base.median_ms:.2f}"
    return [milliseconds(times.median_ms), milliseconds(times.p90_ms), vs_base, str(times.n)]


def parity(report: ReleaseReport) -> Table:
    """One column per stage, one row per figure."""
    stages = [getattr(report.parity, name) for name in PARITY_STAGES]
    rows: list[Sequence[Any]] = [
        ["Compares", "unmerged torch, merged torch", "merged torch, ONNX", "unmerged torch, ONNX"],
        ["Verdict", *(Mark(stage.verdict) for stage in stages)],
        *[[name, *(or_not_applicable(stage, write(stage)) for stage in stages)] for name, write in ROWS.items()],
        *_difference_rows("Max. difference, {} tower", stages, lambda stage: stage.towers or {}, fewest=1),
        *_difference_rows("Max. difference on {}", stages, lambda stage: stage.by_provider or {}, fewest=2),
    ]
    return Table(["Measure", *(TITLES[f"parity.{name}"].removesuffix(" parity") for name in PARITY_STAGES)], rows)


def _difference_rows(
    title: str, stages: Sequence[Parity], named: Callable[[Parity], Mapping[str, Difference]], fewest: int
) -> list[list[str]]:
    """One row per name that `named` gives, if there are at least `fewest` of them."""
    names = list(dict.fromkeys(name for stage in stages for name in named(stage)))
    if len(names) < fewest:
        return []

    def cell(stage: Parity, name: str) -> str:
        found = named(stage).get(name)
        return or_not_applicable(stage, scientific(found.max_abs if found else None))

    return [[title.format(name), *(cell(stage, name) for stage in stages)] for name in names]


def flips(report: ReleaseReport) -> Table | None:
    """Samples whose top-1 class changed, widest margin first."""
    rows = [
        [TITLES[f"parity.{name}"], str(flip.sample), str(flip.before), str(flip.after), scientific(flip.margin)]
        for name in PARITY_STAGES
        for flip in _widest(getattr(report.parity, name))
    ]
    return Table(["Stage", "Sample", "From", "To", "Margin"], rows) if rows else None


def _widest(stage: Parity) -> list[Flip]:
    return sorted(stage.flips, key=lambda flip: -flip.margin)[:FLIPS]


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


def digests(report: ReleaseReport) -> list[tuple[str, str]]:
    """SHA-256 of the base model, of the manifest, of the files and of the rungs that have one."""
    release = report.release
    named = [(f"base {release.base or ''}".strip(), release.base_sha256), ("manifest.json", release.manifest_sha256)]
    named += [*(release.graph or {}).items(), *(release.weights or {}).items()]
    named += [(TITLES[f"proof.{name}"], getattr(report.proof, name).digest) for name in RUNGS]
    return [(name, digest) for name, digest in named if digest]


def in_fp32(reports: Iterable[ReleaseReport]) -> list[ReleaseReport]:
    """The fp32 releases, whose figures represent the run."""
    return [report for report in reports if report.release.precision == "fp32"]


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
