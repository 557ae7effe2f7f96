"""What a report says of parity: how far the stages are apart, and whose answer changed."""

from collections.abc import Mapping, Sequence
from typing import Any

from r1export.report.checks import PARITY, checks
from r1export.report.format import NOT_MEASURED, cosine, percent, scientific
from r1export.report.tables import Table, Verdict


def parity(report: Mapping[str, Any]) -> Table | None:
    """One column per stage, one row per figure."""
    stages = [(report.get("parity") or {}).get(key) or {} for key in PARITY]
    if not any(stages):
        return None
    verdicts = [Verdict(check.verdict) for check in checks(report) if check.group == "parity"]
    rows: list[Sequence[Any]] = [
        ["Compares", "unmerged torch, merged torch", "merged torch, ONNX", "unmerged torch, ONNX"],
        ["Verdict", *verdicts],
        *[[name, *(write(stage) for stage in stages)] for name, write in _PARITY_ROWS.items()],
        *_towers(stages),
        *_by_provider(stages),
    ]
    return Table(["Measure", *(title for title, _ in PARITY.values())], rows)


_PARITY_ROWS = {
    "Largest difference": lambda s: scientific(s.get("max_abs")),
    "Tolerance": lambda s: scientific(s.get("tolerance")),
    "Least tolerance that would pass": lambda s: scientific(s.get("least_tolerance")),
    "Control: base model": lambda s: scientific((s.get("control") or {}).get("max_abs")),
    "99th percentile": lambda s: scientific(s.get("p99_abs")),
    "Lowest cosine": lambda s: cosine(s.get("min_cosine")),
    "Cosine required": lambda s: cosine(s.get("min_cosine_required")),
    "Lowest cosine, base model": lambda s: cosine((s.get("control") or {}).get("min_cosine")),
    "Same top-1 answer": lambda s: percent(s.get("top1_agreement"), 2),
    "Samples": lambda s: NOT_MEASURED if s.get("samples") is None else str(s["samples"]),
    "Batch sizes": lambda s: ", ".join(map(str, s.get("batches") or [])) or NOT_MEASURED,
    "Graph optimisation": lambda s: ", ".join(map(str, s.get("levels") or [])) or NOT_MEASURED,
}


def _towers(stages: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    names = list(dict.fromkeys(name for stage in stages for name in stage.get("towers") or {}))
    towers = [[(stage.get("towers") or {}).get(name) or {} for stage in stages] for name in names]
    return [
        [f"Largest difference, {name} tower", *(scientific(tower.get("max_abs")) for tower in row)]
        for name, row in zip(names, towers, strict=True)
    ]


def _by_provider(stages: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """One row per provider where there are several."""
    names = list(dict.fromkeys(name for stage in stages for name in stage.get("by_provider") or {}))
    if len(names) < 2:
        return []
    found = [[(stage.get("by_provider") or {}).get(name) or {} for stage in stages] for name in names]
    return [
        [f"Largest difference on {name}", *(scientific(stage.get("max_abs")) for stage in row)]
        for name, row in zip(names, found, strict=True)
    ]


def flips(report: Mapping[str, Any]) -> Table | None:
    """Samples whose answer changed, at most ten per stage, widest margin first."""
    rows = []
    for key, (title, _) in PARITY.items():
        found = ((report.get("parity") or {}).get(key) or {}).get("flips") or []
        for flip in sorted(found, key=lambda flip: -(flip.get("margin") or 0))[:10]:
            rows.append(
                [
                    title,
                    str(flip.get("sample")),
                    str(flip.get("from")),
                    str(flip.get("to")),
                    scientific(flip.get("margin")),
                ]
            )
    return Table(["Stage", "Sample", "From", "To", "Margin"], rows) if rows else None
