"""The reports of a release and of a run. Only this module computes their verdicts and reasons from their checks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from r1export.verify.results.accuracy import Accuracy, Drift, Gaps, Guard, RunGaps
from r1export.verify.results.check import SKIPPED, Check, Verdict, named_checks, overall
from r1export.verify.results.contents import Contents, Sensitivity
from r1export.verify.results.latency import Latency, Ratio
from r1export.verify.results.parity import ParityStages
from r1export.verify.results.proof import Proof

TITLES = {  # of the checks of a release, by group and name
    "contents.manifest": "Manifest",
    "contents.files": "Files",
    "contents.base": "Base",
    "contents.graphs": "Graphs",
    "contents.tensors": "Tensor map",
    "contents.weights": "Weights",
    "contents.preprocess": "Preprocessing",
    "contents.tokenizer": "Tokenizer",
    "contents.classes": "Classes",
    "contents.classifier": "Classifier",
    "contents.golden": "Golden samples",
    "contents.accuracy": "Accuracy",
    "contents.card": "Model card",
    "contents.signature": "Signature",
    "parity.merge": "Merge parity",
    "parity.export": "Export parity",
    "parity.total": "Total parity",
    "proof.same_file": "L0 Same file",
    "proof.graph": "L1 Graph",
    "proof.optimized_graph": "L2 Optimized graph",
    "proof.executed_ops": "L3 Executed ops",
    "proof.cost": "L4 Cost",
    "proof.control": "Control: unmerged model",
    "latency": "L5 Time",
    "run.tasks": "Tasks",
    "run.releases": "Release folders",
    "run.gates": "Gates",
    "run.metrics": "Metrics",
}


@dataclass(frozen=True, kw_only=True)
class VariantCost:
    """An fp16 or int8 release compared with the fp32 release of the same number; `speed` is the latency vs. fp32 by provider."""

    precision: str
    bytes: Mapping[str, int]
    bytes_fp32: Mapping[str, int]
    accuracy: Mapping[str, float]
    accuracy_fp32: Mapping[str, float]
    speed: Mapping[str, Ratio] | None = None


@dataclass(frozen=True, kw_only=True)
class ReleaseFacts:
    """The identity of a release. Digests are SHA-256; `bytes` are file sizes, with factors.safetensors for the update."""

    index: int | None
    name: str
    precision: str
    manifest_sha256: str
    task: str | None = None
    base: str | None = None
    base_sha256: str | None = None
    graph: Mapping[str, str] | None = None
    weights: Mapping[str, str] | None = None
    bytes: Mapping[str, int] | None = None

    @property
    def label(self) -> str:
        """The name, with the precision if it is not fp32."""
        return self.name if self.precision == "fp32" else f"{self.name} {self.precision}"

    @property
    def weight_bytes(self) -> int | None:
        """Bytes of all weights files."""
        return sum((self.bytes or {})[name] for name in self.weights) if self.weights else None

    @property
    def update_bytes(self) -> int | None:
        """Bytes of the factors that take a device from the previous release to this one."""
        return self.bytes["factors.safetensors"] if self.bytes and "factors.safetensors" in self.bytes else None


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Versions and the machine. `runtimes`: "measured", or why not."""

    r1export: str
    python: str
    torch: str
    open_clip: str
    onnx: str
    onnxruntime: str
    numpy: str
    cpu: str
    threads: int
    os: str
    gpu: str | None
    runtimes: Mapping[str, str]
    openvino: str | None = None


@dataclass(frozen=True, kw_only=True)
class ReleaseReport:
    """The results for one release."""

    schema: ClassVar[str] = "r1export.report/2"
    created: str
    environment: Environment
    release: ReleaseFacts
    contents: Contents
    parity: ParityStages
    proof: Proof
    latency: Latency
    sensitivity: Sensitivity | None = None
    compatible_with: tuple[Drift, ...] = ()
    gaps: Gaps | None = None
    variant: VariantCost | None = None
    accuracy: Accuracy | None = None

    @property
    def name(self) -> str:
        return self.release.label

    def checks(self) -> Iterator[tuple[str, Check]]:
        """Every check by its key in `TITLES`, in reading order."""
        for group in ("contents", "parity", "proof"):
            for name, check in named_checks(getattr(self, group)):
                yield f"{group}.{name}", check
        yield "latency", self.latency

    @property
    def verdict(self) -> Verdict:
        return overall(check.verdict for _, check in self.checks())

    @property
    def reasons(self) -> tuple[str, ...]:
        """The reasons for a verdict other than pass, failures first."""
        return _reasons(self.checks())


@dataclass(frozen=True, kw_only=True)
class RunContents:
    """Whether the run is complete: every task of the recipe has a release, every release folder was verified, the recipe's
    tolerances are not looser than the defaults, and the summary matches the accuracies.
    """

    tasks: Check
    releases: Check
    gates: Check
    metrics: Check


@dataclass(frozen=True, kw_only=True)
class TaskInputs:
    """The images of a task: how many were used and decoded, the changes made by decoding beyond open_clip's transform, and
    what was skipped.
    """

    task: str
    images: int
    decoded: int
    changes: Mapping[str, int]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The predicted class, and its probability among the classes of the task."""

    name: str
    probability: float


@dataclass(frozen=True, kw_only=True)
class Example:
    """A test image with the predictions of the base model and of the last release. `picture` is a small WebP file in base64."""

    task: str
    name: str
    picture: str
    before: Answer
    after: Answer


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """The results for a run: all of its releases in every precision."""

    schema: ClassVar[str] = "r1export.report/2"
    created: str
    environment: Environment
    recipe: Mapping[str, Any]
    contents: RunContents
    releases: tuple[ReleaseReport, ...]
    accuracy: Accuracy
    gaps: RunGaps | None = None
    guards: Mapping[str, Guard] = field(default_factory=dict)
    inputs: tuple[TaskInputs, ...] = ()
    examples: tuple[Example, ...] = ()

    @property
    def name(self) -> str:
        return "run"

    def checks(self) -> Iterator[tuple[str, Check]]:
        """The checks of the run itself, by their key in `TITLES`."""
        for name, check in named_checks(self.contents):
            yield f"run.{name}", check

    @property
    def verdict(self) -> Verdict:
        own = [check.verdict for _, check in self.checks()]
        return overall([*own, *(report.verdict for report in self.releases)])

    @property
    def reasons(self) -> tuple[str, ...]:
        of_releases = [f"{report.name}: {reason}" for report in self.releases for reason in report.reasons]
        return (*_reasons(self.checks()), *of_releases)


Report = ReleaseReport | RunReport


def _reasons(checks: Iterable[tuple[str, Check]]) -> tuple[str, ...]:
    """The failed checks, then the inconclusive ones, except those skipped because of a failure."""
    named = [(key, check) for key, check in checks if check.detail != SKIPPED]
    words = {Verdict.FAIL: "failed", Verdict.INCONCLUSIVE: "inconclusive"}
    return tuple(
        f"{TITLES[key]}: {word}. {check.detail}".strip()
        for verdict, word in words.items()
        for key, check in named
        if check.verdict is verdict
    )
