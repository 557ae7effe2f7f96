"""What a report says, as titles, sentences and tables of strings: the same for Markdown and HTML."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from r1export.report.checks import LADDER, Check, checks, overall
from r1export.report.format import (
    NOT_MEASURED,
    band,
    cosine,
    milliseconds,
    percent,
    points,
    ratio,
    scientific,
    share,
    size,
)
from r1export.report.matrix import matrix_table, update_bytes, weight_bytes

RUNNERS = {
    "routed_torch": "torch, unmerged (routed)",
    "unmerged_torch": "torch, unmerged (frozen)",
    "merged_torch": "torch, merged",
    "base": "ONNX, base",
    "merged": "ONNX, merged",
    "unmerged": "ONNX, unmerged (branches)",
}
QUESTIONS = {
    "Contents": "The release is what was released: every file, and every weight as base + factors.",
    "Parity": "The device computes what was trained: one merge and one export, each compared on real samples.",
    "Same program": "Base and merged release run the identical program; only weight bytes differ.",
    "Added latency": "Timed in interleaved pairs, the merged model is as fast as the base model, within the margin.",
    "Control": "A model with its branches left in must be caught by the same checks.",
}


@dataclass(frozen=True)
class Table:
    """Cells are text or a `Verdict`. The first column names the row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Verdict:
    """A cell that is shown as a mark and a word, followed by the evidence."""

    verdict: str
    evidence: str = ""


def groups(found: Sequence[Check]) -> Table:
    """What was checked, in one sentence each."""
    parts = {
        **({"Contents": inside} if (inside := [check for check in found if check.group == "contents"]) else {}),
        "Parity": [check for check in found if check.group == "parity"],
        "Same program": [check for check in found if check.key in LADDER],
        "Added latency": [check for check in found if check.key == "time"],
        "Control": [check for check in found if check.key == "control"],
    }
    rows = [[name, QUESTIONS[name], together(part)] for name, part in parts.items()]
    return Table(["Question", "What holds if it passed", "Verdict"], rows)


def together(part: Sequence[Check]) -> Verdict:
    """The verdict of several checks, and how many of them were not made."""
    missing = sum(check.verdict == NOT_MEASURED for check in part)
    if missing == len(part):
        return Verdict(NOT_MEASURED)
    return Verdict(
        overall(check.verdict for check in part), f"{missing} of {len(part)} not measured" if missing else ""
    )


def ladder(report: Mapping[str, Any]) -> Table:
    """The rungs L0 to L5 and the control: what each shows, its verdict, its evidence and the start of its digest."""
    proof = report.get("proof") or {}
    rows = [
        [check.title, check.shows, Verdict(check.verdict, f"{check.evidence} {_digest(proof.get(check.key))}".strip())]
        for check in checks(report)
        if check.group in ("proof", "latency")
    ]
    return Table(["Rung", "Shows", "Verdict and evidence"], rows)


def contents(report: Mapping[str, Any]) -> Table | None:
    """What was looked at inside the release, one row per part."""
    rows = [
        [check.title, check.shows, Verdict(check.verdict, check.evidence)]
        for check in checks(report)
        if check.group == "contents"
    ]
    return Table(["Part", "Shows", "Verdict and evidence"], rows) if rows else None


def drift(report: Mapping[str, Any]) -> Table | None:
    """Whether galleries indexed with an earlier release may be kept."""
    found = report.get("drift") or {}
    if not found:
        return None
    recalls = [
        [f"Of the {k} nearest, still found", percent(found[key])] for k in (1, 10) if (key := f"recall_at_{k}") in found
    ]
    rows = [
        ["Index again", found.get("reindex") or NOT_MEASURED],
        ["Images", str(found.get("images"))],
        ["Mean cosine", cosine(found.get("mean_cosine"))],
    ]
    return Table(
        [f"Against {found.get('against')}", "Found"],
        [*rows, ["Lowest cosine", cosine(found.get("min_cosine"))], *recalls],
    )


def _digest(rung: Mapping[str, Any] | None) -> str:
    digest, expected = ((rung or {}).get(key) for key in ("digest", "expected"))
    if not digest:
        return ""
    if expected and expected != digest:
        return f"Found `{digest[:16]}`, expected `{expected[:16]}`."
    return f"sha256 `{digest[:16]}`"


def timings(report: Mapping[str, Any]) -> Table | None:
    """Median and p90 of every runner, provider and batch, with its ratio to the base model there."""
    rows = []
    for provider, batches in ((report.get("latency") or {}).get("providers") or {}).items():
        for batch, runners in batches.items():
            base = ((runners or {}).get("base") or {}).get("median_ms")
            for key, name in RUNNERS.items():
                if times := (runners or {}).get(key):
                    rows.append([name, provider.removesuffix("ExecutionProvider"), batch, *_times(times, base)])
    return Table(["Model", "Provider", "Batch", "Median, ms", "p90, ms", "To base", "Runs"], rows) if rows else None


def _times(times: Mapping[str, Any], base: float | None) -> list[str]:
    middle, count = times.get("median_ms"), times.get("n")
    return [
        milliseconds(middle),
        milliseconds(times.get("p90_ms")),
        f"{middle / base:.2f}" if middle and base else NOT_MEASURED,
        NOT_MEASURED if count is None else str(count),
    ]


def accuracies(accuracy: Mapping[str, Any] | None) -> Table | None:
    """The accuracy matrix in percent."""
    names, columns, values = matrix_table(accuracy)
    if not names:
        return None
    rows = [
        [name, *(percent(value).removesuffix(" %") for value in row)] for name, row in zip(names, values, strict=True)
    ]
    return Table(["Accuracy, %", *columns], rows)


def accuracy_summary(accuracy: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """The figures of continual learning that people compare, those that were measured."""
    accuracy = accuracy or {}
    names = {"zero_shot_avg": "Zero-shot", "transfer": "Transfer", "avg": "Average", "last": "Last"}
    found = [(title, percent(accuracy[key])) for key, title in names.items() if accuracy.get(key) is not None]
    lost = [value for value in accuracy.get("forgetting") or [] if value is not None]
    if lost:
        found.append(("Worst forgetting", points(max(lost))))
    gaps = {key: gap for key, gap in (accuracy.get("gaps") or {}).items() if isinstance(gap, (int, float))}
    if "G1" in gaps:
        found.append(("Merge gap (G1)", scientific(gaps["G1"])))
    names = {"G2": "Freezing gap (G2)", "G3": "Shrink gap (G3)"}
    return found + [(title, points(gaps[key])) for key, title in names.items() if key in gaps]


def facts(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The four figures to remember: name, figure, what to hold it against."""
    total, latency = (report.get("parity") or {}).get("total") or {}, report.get("latency") or {}
    release, accuracy = report.get("release") or {}, report.get("accuracy") or {}
    weights, update = weight_bytes(release), update_bytes(release)
    found = []
    if total.get("max_abs") is not None:
        found.append(
            ("Largest difference", scientific(total["max_abs"]), f"tolerance {scientific(total.get('tolerance'))}")
        )
    if latency.get("ratio") is not None:
        found.append(("Time, to base", ratio(latency["ratio"]), f"95 % interval {band(latency.get('ci95'))}"))
    if update is not None:
        found.append(("Update", size(update), f"{share(update, weights)} of {size(weights)}" if weights else ""))
    if accuracy.get("last") is not None:
        found.append(
            ("Accuracy, last", percent(accuracy["last"]), f"zero-shot {percent(accuracy.get('zero_shot_avg'))}")
        )
    return found


def digests(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Whole sha256 of the base model, of the files and of the rungs that have one."""
    release, proof = report.get("release") or {}, report.get("proof") or {}
    found = [(f"base {release.get('base') or ''}".strip(), release.get("base_sha256"))]
    found += [line for part in ("graph", "weights") for line in (release.get(part) or {}).items()]
    found += [(title, (proof.get(key) or {}).get("digest")) for key, (title, _) in LADDER.items()]
    return [(name, digest) for name, digest in found if digest]


def settings(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names and values."""
    if isinstance(value, Mapping):
        return [line for key, part in value.items() for line in settings(part, f"{path}.{key}" if path else str(key))]
    if isinstance(value, list) and any(isinstance(part, (Mapping, list)) for part in value):
        return [line for n, part in enumerate(value) for line in settings(part, f"{path}[{n}]")]
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return [(path, "none" if value is None else str(value))]
