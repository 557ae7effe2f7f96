"""What each check of a report shows, in one sentence, and how its evidence is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from r1export.report.format import cosine, interval, percent, ratio, scientific
from r1export.verify.results import TITLES, Check, Latency, Parity, Report, Rung, Verdict
from r1export.verify.runtimes.runtime import PROVIDERS

SHOWS = {
    "contents.manifest": "The manifest is the one that was written, and says what the run says.",
    "contents.files": "Every file is the one that was released; nothing is missing or added.",
    "contents.base": "The base is the model that the run started from, or that the base release contains.",
    "contents.graphs": "The graphs compute what was released, with the model's own epsilons.",
    "contents.tensors": "The manifest says where every tensor lies, and every value is finite.",
    "contents.weights": "Every parameter is base + factors, bit for bit.",
    "contents.preprocess": "preprocess.json and preprocess.onnx turn the golden pictures into what the tower was fed.",
    "contents.tokenizer": "The tokenizer files turn the golden prompts into what the text tower was fed.",
    "contents.classes": "Class embeddings are what the release's own text tower gives.",
    "contents.classifier": "classify.onnx gives the scaled products of image and class embeddings.",
    "contents.golden": "The stored inputs give the stored outputs.",
    "contents.accuracy": "The accuracies that are claimed are measured again, within the error of the sample.",
    "contents.card": "README.md is the model card that follows from the manifest.",
    "contents.signature": "Every file is the one that an update says, which is signed by keys that are trusted.",
    "parity.merge": "The unmerged experts and the merged model agree in torch: the merge is right.",
    "parity.export": "The merged model in torch and in ONNX agree: the export is right.",
    "parity.total": "The unmerged experts in torch and the ONNX model agree: the device runs what was trained.",
    "proof.same_file": "Base and merged model use byte-identical .onnx files; only weights differ.",
    "proof.graph": "The same nodes, edges, attributes, shapes and dtypes, whatever the names.",
    "proof.optimized_graph": "The same program after the runtime's own optimizer, per provider.",
    "proof.executed_ops": "The profiled run executes the same operators in the same order.",
    "proof.cost": "The same arithmetic, weight bytes and peak memory.",
    "proof.control": "The model with its low-rank branches left in must be told apart, otherwise the test has no power.",
    "latency": "In interleaved pairs the merged model takes as long as the base model, by the steadiest clock.",
    "run.tasks": "Every task of the recipe is learned and released.",
    "run.releases": "Every release folder of the run was verified.",
    "run.gates": "The recipe's gates are no laxer than those of r1export.",
    "run.metrics": "Transfer, average, last and forgetting follow from the accuracies.",
}


@dataclass(frozen=True)
class Line:
    """One check as pages show it."""

    key: str
    title: str
    shows: str
    verdict: Verdict
    evidence: str

    @property
    def group(self) -> str:
        """contents, parity, proof, latency or run."""
        return self.key.partition(".")[0]

    @property
    def name(self) -> str:
        return self.key.rpartition(".")[2]


def lines(report: Report) -> list[Line]:
    """All checks of a report in the order in which a reader wants them."""
    return [Line(key, TITLES[key], SHOWS[key], check.verdict, evidence(check)) for key, check in report.checks()]


def evidence(check: Check) -> str:
    """What was seen, and how much was looked at."""
    match check:
        case Parity(max_abs=float()):
            return _joined(_parity(check), check.detail if check.verdict is not Verdict.PASS else "")
        case Latency(ratio=float()):
            return _joined(*_latency(check), check.detail)
    counts = f"({check.looked_at} of {check.of})" if check.of else ""
    digests = _digests(check) if isinstance(check, Rung) and check.digest else ""
    return _joined(check.detail, counts, digests)


def _joined(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _parity(parity: Parity) -> str:
    return (
        f"Max. difference {scientific(parity.max_abs)} with a tolerance of {scientific(parity.tolerance)}; "
        f"lowest cosine {cosine(parity.min_cosine)}; {parity.looked_at} of {parity.of} samples."
    )


def _digests(rung: Rung) -> str:
    if rung.digest == rung.expected:
        return f"sha256 `{rung.digest[:16]}`"
    return f"Found `{rung.digest[:16]}`, expected `{rung.expected[:16]}`."


def _latency(latency: Latency) -> Iterator[str]:
    by = f" by {latency.clock}" if latency.clock else ""
    yield f"{ratio(latency.ratio)} times the base{by}, 95 % interval {interval(latency.ci95)}, margin {percent(latency.margin, 0)}."
    yield f"{latency.pairs} pairs of the {latency.tower} tower."
    by_provider = latency.by_provider or {}
    if len(by_provider) > 1:
        each = (f"{label(name)} {ratio(one.ratio)}, {interval(one.ci95)}" for name, one in by_provider.items())
        yield f"By provider: {'; '.join(each)}."
    if latency.noise_floor:
        yield f"Base against itself: {interval(latency.noise_floor.ci95)}."
    if latency.unmerged_ratio is not None:
        yield f"Unmerged: {ratio(latency.unmerged_ratio)}."


def label(provider: str) -> str:
    """The short name of a runtime's provider."""
    return next((known.label for known in PROVIDERS.values() if known.name == provider), provider)
