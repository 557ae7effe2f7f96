"""The checks of a report: what each one shows, its verdict and its evidence.

A check that has no verdict was not measured. It is never counted as passed.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from r1export.report.format import NOT_MEASURED, band, cosine, percent, ratio, scientific

PASS, FAIL, INCONCLUSIVE = "pass", "fail", "inconclusive"
VERDICTS = (PASS, INCONCLUSIVE, FAIL, NOT_MEASURED)

PARITY = {
    "merge": (
        "Merge",
        "The experts as trained, unmerged, against the merged model, both in torch: the merge is right.",
    ),
    "export": ("Export", "The merged model in torch against ONNX: the export is right."),
    "total": ("Total", "The unmerged experts in torch against ONNX: the device runs what was trained."),
}
LADDER = {
    "same_file": ("L0 Same file", "Base and merged model use byte-identical .onnx files; only weights differ."),
    "graph": ("L1 Graph", "The same nodes, edges, attributes, shapes and dtypes, whatever the names."),
    "optimized_graph": ("L2 Optimised graph", "The same program after the runtime's own optimiser, per provider."),
    "executed_ops": ("L3 Executed ops", "The profiled run executes the same operators in the same order."),
    "cost": ("L4 Cost", "The same arithmetic, weight bytes and peak memory."),
}
CONTENTS = {
    "manifest": ("Manifest", "The manifest is the one that was written, and says what the run says."),
    "files": ("Files", "Every file is the one that was released; nothing is missing or added."),
    "graphs": ("Graphs", "The norms of the graphs have the model's own epsilons."),
    "weights": ("Weights", "Every parameter is base + factors, bit for bit, where the manifest says it lies."),
    "classes": ("Classes", "Class embeddings are what the release's own text tower gives."),
    "classifier": ("Classifier", "classify.onnx gives the scaled products of image and class embeddings."),
    "golden": ("Golden samples", "The stored inputs give the stored outputs."),
}
TIME = ("L5 Time", "In interleaved pairs the merged model takes as long as the base model.")
CONTROL = (
    "Control: unmerged",
    "The model with its low-rank branches left in must be told apart, or the proof is blind.",
)


@dataclass(frozen=True)
class Check:
    """One line of evidence. `group` is contents, parity, proof or latency; `key` is its place in the report."""

    group: str
    key: str
    title: str
    shows: str
    verdict: str
    evidence: str


def overall(verdicts: Iterable[str | None]) -> str:
    """One verdict for many: fail beats inconclusive beats pass; nothing measured is inconclusive.

    Law: the order of `verdicts` does not matter, and adding one never turns another result into a pass
    unless nothing was measured before.
    """
    measured = {verdict_of({"verdict": verdict}) for verdict in verdicts} - {NOT_MEASURED}
    if FAIL in measured:
        return FAIL
    return PASS if measured == {PASS} else INCONCLUSIVE


def verdict_of(part: Mapping[str, Any] | None) -> str:
    """The verdict of one part of a report. ValueError for a word that is not a verdict."""
    verdict = (part or {}).get("verdict") or NOT_MEASURED
    if verdict not in VERDICTS:
        raise ValueError(f"found the verdict {verdict!r}, expected one of {', '.join(VERDICTS)}")
    return verdict


def failed(parts: Mapping[str, Any]) -> bool:
    """Whether any of several parts of a report has failed."""
    return any(part.get("verdict") == FAIL for part in parts.values())


def checks(report: Mapping[str, Any]) -> list[Check]:
    """All checks of one release in the order in which a reader wants them, measured or not."""
    return [*_contents(report), *_parity(report), *_proof(report), _latency(report), _control(report)]


def _contents(report: Mapping[str, Any]) -> Iterator[Check]:
    """Only those that were looked at: a release by itself cannot know its factors, and a damaged one is not looked into."""
    parts = report.get("contents") or {}
    for key, (title, shows) in CONTENTS.items():
        if part := parts.get(key):
            yield Check("contents", key, title, shows, verdict_of(part), part.get("detail") or "")


def _parity(report: Mapping[str, Any]) -> Iterator[Check]:
    stages = report.get("parity") or {}
    for key, (title, shows) in PARITY.items():
        stage = stages.get(key) or {}
        verdict = _with_figure(verdict_of(stage), stage.get("max_abs"))
        yield Check("parity", key, title, shows, verdict, _parity_evidence(stage, verdict))


def _parity_evidence(stage: Mapping[str, Any], verdict: str) -> str:
    detail = stage.get("detail") or ""
    if stage.get("max_abs") is None:
        return f"No finite largest difference was found. {detail}".strip() if verdict in (FAIL, INCONCLUSIVE) else ""
    figures = (
        f"Largest difference {scientific(stage['max_abs'])} with a tolerance of {scientific(stage.get('tolerance'))}; "
        f"lowest cosine {cosine(stage.get('min_cosine'))}."
    )
    return f"{figures} {detail}".strip()


def _proof(report: Mapping[str, Any]) -> Iterator[Check]:
    proof = report.get("proof") or {}
    for key, (title, shows) in LADDER.items():
        rung = proof.get(key) or {}
        yield Check("proof", key, title, shows, verdict_of(rung), rung.get("detail") or "")


def _latency(report: Mapping[str, Any]) -> Check:
    latency = report.get("latency") or {}
    verdict = _with_figure(verdict_of(latency), latency.get("ratio"))
    return Check("latency", "time", *TIME, verdict, " ".join(_latency_evidence(latency)))


def _latency_evidence(latency: Mapping[str, Any]) -> Iterator[str]:
    if latency.get("ratio") is not None:
        margin = f", margin {percent(latency['margin'], 0)}" if latency.get("margin") else ""
        yield f"{ratio(latency['ratio'])} times the base, 95 % interval {band(latency.get('ci95'))}{margin}."
    if latency.get("pairs"):
        yield f"{latency['pairs']} pairs{f' of the {tower} tower' if (tower := latency.get('tower')) else ''}."
    if len(by_provider := latency.get("by_provider") or {}) > 1:
        found = (
            f"{_short(name)} {ratio(one.get('ratio'))}, {band(one.get('ci95'))}" for name, one in by_provider.items()
        )
        yield f"By provider: {'; '.join(found)}."
    if floor := latency.get("noise_floor"):
        yield f"Base against itself: {band(floor.get('ci95'))}."
    if latency.get("unmerged_ratio") is not None:
        yield f"Unmerged: {ratio(latency['unmerged_ratio'])}."
    if latency.get("advice"):
        yield latency["advice"]


def _short(provider: str) -> str:
    return provider.removesuffix("ExecutionProvider")


def _control(report: Mapping[str, Any]) -> Check:
    control = ((report.get("proof") or {}).get("control") or {}).get("unmerged") or {}
    told: dict[Any, str] = {True: PASS, False: FAIL}  # anything else: it was tried and gave no answer
    verdict = told.get(control.get("detected"), INCONCLUSIVE) if control else NOT_MEASURED
    return Check("proof", "control", *CONTROL, verdict, control.get("detail") or "")


def _with_figure(verdict: str, figure: float | None) -> str:
    """A pass without its deciding figure (absent, or NaN written as null) is inconclusive."""
    return INCONCLUSIVE if verdict == PASS and figure is None else verdict
