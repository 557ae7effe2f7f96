"""A one-sentence description of each check of a report, and the text of its evidence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from r1export.report.format import cosine, interval, percent, ratio, scientific
from r1export.verify.results import TITLES, Check, Latency, Parity, Report, Rung, Verdict
from r1export.verify.runtimes.runtime import PROVIDERS

SHOWS = {
    "contents.manifest": "The manifest is unmodified and agrees with the run.",
    "contents.files": "Every file has its released digest; no file is missing or added.",
    "contents.base": "The base model is the one that the run started from, or that the base release contains.",
    "contents.graphs": "The graphs have their released structure digests, and the model's epsilons.",
    "contents.tensors": "The manifest locates every tensor, and every value is finite.",
    "contents.weights": "Every parameter is base + factors, bit for bit.",
    "contents.preprocess": "preprocess.json and preprocess.onnx turn the golden images into the stored pixel_values.",
    "contents.tokenizer": "The tokenizer files turn the golden prompts into the stored input_ids.",
    "contents.classes": "Class embeddings match the output of the release's text tower.",
    "contents.classifier": "classify.onnx returns the scaled dot products of image and class embeddings.",
    "contents.golden": "The golden inputs give the golden outputs.",
    "contents.accuracy": "The claimed accuracies are reproduced within the sampling error.",
    "contents.card": "README.md is the model card generated from the manifest.",
    "contents.signature": "Every file has the digest in an update that is signed with trusted keys.",
    "parity.merge": "Unmerged and merged model agree in torch: the merge is correct.",
    "parity.export": "Merged model in torch and ONNX agree: the export is correct.",
    "parity.total": "Unmerged model in torch and ONNX agree: the device runs what was trained.",
    "proof.same_file": "Base and merged model have byte-identical .onnx files; only the weights differ.",
    "proof.graph": "Same nodes, edges, attributes, shapes and dtypes, regardless of names.",
    "proof.optimized_graph": "Same graph after the runtime's optimizer, per provider.",
    "proof.executed_ops": "A profiled run executes the same operators in the same order.",
    "proof.cost": "Same FLOPs, weight bytes and peak memory.",
    "proof.control": "The model with unmerged LoRA branches must fail these checks, otherwise the test has no power.",
    "latency": "Merged and base model, timed together, are equally fast within the margin.",
    "run.tasks": "Every task of the recipe is trained and has a release.",
    "run.releases": "Every release folder of the run was verified.",
    "run.gates": "The recipe's tolerances are not looser than r1export's defaults.",
    "run.metrics": "Transfer, average, last and forgetting match the accuracy matrix.",
}


@dataclass(frozen=True)
class Line:
    """One check as shown in a report."""

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
    """All checks of a report in reading order."""
    return [Line(key, TITLES[key], SHOWS[key], check.verdict, evidence(check)) for key, check in report.checks()]


def evidence(check: Check) -> str:
    """The result of a check in words and figures, and how many items were checked."""
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
        f"Max. difference {scientific(parity.max_abs)}, tolerance {scientific(parity.tolerance)}; "
        f"lowest cosine {cosine(parity.min_cosine)}; {parity.looked_at} of {parity.of} samples."
    )


def _digests(rung: Rung) -> str:
    if rung.digest == rung.expected:
        return f"sha256 `{rung.digest[:16]}`"
    return f"Found `{rung.digest[:16]}`, expected `{rung.expected[:16]}`."


def _latency(latency: Latency) -> Iterator[str]:
    by = f" by {latency.clock}" if latency.clock else ""
    yield f"{ratio(latency.ratio)} vs. base{by}, 95 % CI {interval(latency.ci95)}, margin {percent(latency.margin, 0)}."
    yield f"{latency.pairs} pairs of runs of the {latency.tower} tower."
    by_provider = latency.by_provider or {}
    if len(by_provider) > 1:
        each = (f"{label(name)} {ratio(one.ratio)}, {interval(one.ci95)}" for name, one in by_provider.items())
        yield f"By provider: {'; '.join(each)}."
    if latency.noise_floor:
        yield f"Noise (base vs. base): {interval(latency.noise_floor.ci95)}."
    if latency.unmerged_ratio is not None:
        yield f"Unmerged vs. base: {ratio(latency.unmerged_ratio)}."


def label(provider: str) -> str:
    """The short name of a runtime's provider."""
    return next((known.label for known in PROVIDERS.values() if known.name == provider), provider)
