"""What a report says of one release: every check, the differences, times and digests, shared by Markdown and HTML."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from r1export.report.checks import label, lines
from r1export.report.format import (
    NOT_MEASURED,
    cosine,
    interval,
    milliseconds,
    or_not_applicable,
    percent,
    ratio,
    scientific,
)
from r1export.report.table import Mark, Table, check_table
from r1export.verify.results import (
    PARITY_STAGES,
    RUNGS,
    TITLES,
    Agreement,
    Difference,
    Drift,
    Flip,
    Latency,
    Parity,
    Ratio,
    ReleaseReport,
    Sensitivity,
    Times,
)

MODELS = {
    "routed_torch": "torch, unmerged (routed)",
    "unmerged_torch": "torch, unmerged (frozen)",
    "merged_torch": "torch, merged",
    "base": "ONNX, base",
    "merged": "ONNX, merged",
    "unmerged": "ONNX, unmerged (branches)",
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


def contents(report: ReleaseReport) -> Table:
    return check_table([line for line in lines(report) if line.group == "contents"], "Part")


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


def ladder(report: ReleaseReport) -> Table:
    """The rungs L0 to L5 and the control."""
    return check_table([line for line in lines(report) if line.group in ("proof", "latency")], "Rung")


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


def _times(times: Times, base: Times) -> list[str]:
    vs_base = f"{times.median_ms / base.median_ms:.2f}"
    return [milliseconds(times.median_ms), milliseconds(times.p90_ms), vs_base, str(times.n)]


def digests(report: ReleaseReport) -> list[tuple[str, str]]:
    """SHA-256 of the base model, of the manifest, of the files and of the rungs that have one."""
    release = report.release
    named = [(f"base {release.base or ''}".strip(), release.base_sha256), ("manifest.json", release.manifest_sha256)]
    named += [*(release.graph or {}).items(), *(release.weights or {}).items()]
    named += [(TITLES[f"proof.{name}"], getattr(report.proof, name).digest) for name in RUNGS]
    return [(name, digest) for name, digest in named if digest]
