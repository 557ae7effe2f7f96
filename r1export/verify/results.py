"""The results of a verification as frozen types.

A `Check` can pass only if it looked at all of its items, and there is at least one. Parity, latency and the rungs of the
proof also need the figures that decide them. Only this module computes a report's verdict and reasons from its checks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, ClassVar, Self

LISTED = 5  # problems that one check names; the rest are counted
SKIPPED = "not measured because an earlier check failed"
UNTIMED = "not measured (--no-latency)"
PARITY_STAGES = ("merge", "export", "total")
RUNGS = ("same_file", "graph", "optimized_graph", "executed_ops", "cost")
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


class Verdict(StrEnum):
    """The result of a check. NOT_APPLICABLE: there is nothing to check, which is neither a pass nor a reason against one."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    NOT_APPLICABLE = "not_applicable"


def overall(verdicts: Iterable[Verdict]) -> Verdict:
    """One verdict for many: fail beats inconclusive beats pass. Checks that don't apply are ignored; none left is inconclusive."""
    applicable = set(verdicts) - {Verdict.NOT_APPLICABLE}
    if Verdict.FAIL in applicable:
        return Verdict.FAIL
    return Verdict.PASS if applicable == {Verdict.PASS} else Verdict.INCONCLUSIVE


def combined(verdicts: Iterable[Verdict]) -> Verdict:
    """One verdict for checks that are shown together: as `overall`, but not applicable if none of them applies."""
    listed = set(verdicts)
    return Verdict.NOT_APPLICABLE if listed <= {Verdict.NOT_APPLICABLE} else overall(listed)


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of one check, which looked at `looked_at` of `of` items.

    Raises ValueError for a pass that did not look at every item or has none, and for a check that doesn't apply but has
    items or no reason.
    """

    verdict: Verdict
    looked_at: int
    of: int
    detail: str = ""

    def __post_init__(self) -> None:
        if self.looked_at < 0 or self.of < 0:
            raise ValueError(f"looked at {self.looked_at} of {self.of}")
        if self.verdict is Verdict.NOT_APPLICABLE and (self.of or self.looked_at or not self.detail):
            raise ValueError("a check that does not apply has a reason and nothing to look at")
        if self.verdict is Verdict.PASS and not 0 < self.looked_at == self.of:
            raise ValueError(f"a pass that looked at {self.looked_at} of {self.of}")
        if self.verdict is Verdict.PASS and not self._decided():
            raise ValueError("a pass without the figures that decide it")

    def _decided(self) -> bool:
        """Whether the figures of the check support a pass."""
        return True

    @classmethod
    def judge(cls, problems: Iterable[str], *, looked_at: int, of: int, detail: str, **figures: Any) -> Self:
        """A failure for any problem; inconclusive if items are missing or there are none; a pass otherwise.

        `detail` is the sentence for a pass. `figures` are the other fields of the type.
        """
        listed = list(problems)
        if listed:
            more = f" (and {len(listed) - LISTED} more)" if len(listed) > LISTED else ""
            verdict, detail = Verdict.FAIL, "; ".join(listed[:LISTED]) + more
        elif 0 < looked_at == of:
            verdict = Verdict.PASS
        else:
            verdict, detail = Verdict.INCONCLUSIVE, f"looked at {looked_at} of {of}; a pass needs all"
        return cls(verdict=verdict, looked_at=looked_at, of=of, detail=detail, **figures)

    @classmethod
    def failed(cls, reason: str, *, looked_at: int = 0, of: int = 0) -> Self:
        """A failure without figures: the measurement could not run."""
        return cls(verdict=Verdict.FAIL, looked_at=looked_at, of=of, detail=reason)

    @classmethod
    def joined(cls, checks: Iterable[Check]) -> Check:
        """One check for several related ones, of which there is at least one."""
        listed = list(checks)
        verdict = overall(check.verdict for check in listed)
        telling = [c.detail for c in listed if c.verdict is verdict or verdict is Verdict.PASS]
        looked_at, of = sum(c.looked_at for c in listed), sum(c.of for c in listed)
        return Check(verdict=verdict, looked_at=looked_at, of=of, detail="; ".join(telling))

    @classmethod
    def unmeasured(cls, reason: str, *, of: int = 0) -> Self:
        """Inconclusive: could not be measured, with the reason."""
        return cls(verdict=Verdict.INCONCLUSIVE, looked_at=0, of=of, detail=reason)

    @classmethod
    def not_applicable(cls, reason: str) -> Self:
        """The check doesn't apply, with the reason."""
        return cls(verdict=Verdict.NOT_APPLICABLE, looked_at=0, of=0, detail=reason)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference of two sets of embeddings: maximum and 99th percentile of |a - b|, lowest cosine of a row.

    All three are None if a value is NaN or infinite, the shapes differ, or there is nothing to compare.
    """

    max_abs: float | None
    p99_abs: float | None
    min_cosine: float | None


@dataclass(frozen=True, kw_only=True)
class Flip:
    """An image whose nearest text changed, and the margin (in cosine) of the reference."""

    sample: int
    margin: float
    before: int
    after: int


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """`counts` (n) of absolute differences between `edges` (n + 1)."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Parity(Check):
    """One stage of parity: the worst over all towers, inputs and execution configurations. Counts are embeddings.

    `tolerance` and `min_cosine_required` are the applied limits, `least_tolerance` is the smallest tolerance that would
    pass (None: no tolerance would), `control` the same difference of the base model.
    """

    max_abs: float | None = None
    p99_abs: float | None = None
    min_cosine: float | None = None
    top1_agreement: float | None = None
    samples: int = 0
    tolerance: float | None = None
    least_tolerance: float | None = None
    min_cosine_required: float | None = None
    control: Difference | None = None
    flips: tuple[Flip, ...] = ()
    histogram: Histogram | None = None
    towers: Mapping[str, Difference] | None = None
    by_provider: Mapping[str, Difference] | None = None
    providers: tuple[str, ...] = ()
    levels: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()

    @property
    def difference(self) -> Difference:
        return Difference(max_abs=self.max_abs, p99_abs=self.p99_abs, min_cosine=self.min_cosine)

    def _decided(self) -> bool:
        figures = (self.max_abs, self.tolerance, self.min_cosine, self.min_cosine_required)
        if None in figures or not all(map(math.isfinite, figures)):  # type: ignore[arg-type]
            return False
        max_abs, tolerance, min_cosine, required = figures
        return max_abs <= tolerance and min_cosine >= required  # type: ignore[operator]


@dataclass(frozen=True, kw_only=True)
class ParityStages:
    """merge: unmerged torch to merged torch. export: merged torch to ONNX. total: unmerged torch to ONNX."""

    merge: Parity
    export: Parity
    total: Parity

    @classmethod
    def unmeasured(cls, reason: str) -> ParityStages:
        return cls(**dict.fromkeys(PARITY_STAGES, Parity.unmeasured(reason)))

    @property
    def verdict(self) -> Verdict:
        return overall(getattr(self, name).verdict for name in PARITY_STAGES)


@dataclass(frozen=True, kw_only=True)
class Rung(Check):
    """One rung of the proof: the digests of the release and of the base, which must be equal. Counts are graphs."""

    digest: str = ""
    expected: str = ""

    def _decided(self) -> bool:
        return bool(self.digest) and self.digest == self.expected


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The rungs L0 to L4, and the control: the rungs must detect the unmerged model. Its counts are towers."""

    same_file: Rung
    graph: Rung
    optimized_graph: Rung
    executed_ops: Rung
    cost: Rung
    control: Check

    @classmethod
    def unmeasured(cls, reason: str) -> Proof:
        return cls(**dict.fromkeys(RUNGS, Rung.unmeasured(reason)), control=Check.unmeasured(reason))

    @classmethod
    def not_applicable(cls, reason: str) -> Proof:
        return cls(**dict.fromkeys(RUNGS, Rung.not_applicable(reason)), control=Check.not_applicable(reason))

    @property
    def verdict(self) -> Verdict:
        """The verdict of the rungs, without the control."""
        return overall(getattr(self, name).verdict for name in RUNGS)


@dataclass(frozen=True)
class Ratio:
    """A ratio of times: exp(median log-ratio) and its 95 % interval."""

    ratio: float
    ci95: tuple[float, float]

    @property
    def halfwidth(self) -> float:
        """Half the width of the interval in logarithms: equal noise has equal width for any ratio."""
        return math.log(self.ci95[1] / self.ci95[0]) / 2

    def within(self, margin: float) -> bool:
        """The whole interval lies between 1 / (1 + margin) and 1 + margin."""
        return self.ci95[0] >= 1 / (1 + margin) and self.ci95[1] <= 1 + margin


@dataclass(frozen=True, kw_only=True)
class Times:
    """Median and quantiles of `n` single runs in milliseconds; None where there are too few runs for a quantile."""

    median_ms: float
    p90_ms: float | None
    p99_ms: float | None
    n: int


@dataclass(frozen=True, kw_only=True)
class ClockRatios:
    """The ratios of one clock: merged, base again (`noise`) and unmerged, each vs. base.

    `threads` of the session, 0 for all cores; `pairs` counts runs.
    """

    merged: Ratio
    noise: Ratio
    unmerged: Ratio | None = None
    threads: int = 0
    pairs: int = 0


@dataclass(frozen=True, kw_only=True)
class ProviderLatency:
    """Added latency on one provider, with the noise floor (base vs. base).

    `clock` decides the verdict; `clocks` are all that were read.
    """

    verdict: Verdict
    ratio: float
    ci95: tuple[float, float]
    noise_floor: Ratio
    clock: str = "wall clock"
    clocks: Mapping[str, ClockRatios] | None = None


@dataclass(frozen=True, kw_only=True)
class Latency(Check):
    """Rung L5: the latency of the merged model vs. base, on the worst provider. Counts are providers.

    `tower` is the timed tower, `clock` the deciding clock, `pair_ratios` the single pairs. `providers` has wall-clock times
    by provider, batch size and model. `uncounted` says why there are no cycles and instructions.
    """

    tower: str | None = None
    clock: str | None = None
    ratio: float | None = None
    ci95: tuple[float, float] | None = None
    margin: float | None = None
    noise_floor: Ratio | None = None
    unmerged_ratio: float | None = None
    pairs: int = 0
    pair_ratios: tuple[float, ...] = ()
    providers: Mapping[str, Mapping[str, Mapping[str, Times]]] | None = None
    by_provider: Mapping[str, ProviderLatency] | None = None
    uncounted: str = ""

    def _decided(self) -> bool:
        if self.ratio is None or self.ci95 is None or self.margin is None or self.noise_floor is None:
            return False
        return Ratio(self.ratio, self.ci95).within(self.margin) and self.noise_floor.within(self.margin)


UNSIGNED = Check.not_applicable("no signed update to compare with (--bundle)")


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The checks of the contents of a release folder."""

    manifest: Check
    files: Check
    base: Check
    graphs: Check
    tensors: Check
    weights: Check
    preprocess: Check
    tokenizer: Check
    classes: Check
    classifier: Check
    golden: Check
    accuracy: Check
    card: Check
    signature: Check

    @classmethod
    def only(cls, reason: str, **measured: Check) -> Contents:
        """The `measured` checks; all others are unmeasured because of `reason`."""
        return cls(**{f.name: Check.unmeasured(reason) for f in fields(cls)} | {"signature": UNSIGNED} | measured)

    @property
    def verdict(self) -> Verdict:
        return overall(check.verdict for _, check in named_checks(self))


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What golden samples can detect: the smallest relative change of all values of `parameter` that fails the check.

    None: not even `largest_tried` fails it.
    """

    parameter: str
    relative_change: float | None
    largest_tried: float


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The share of the k nearest neighbours that stays the same if queries come from another version than the vectors.

    None: too few images.
    """

    top1: float | None
    recall_at_10: float | None


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Embeddings of the same images with an earlier release (`against`) and this one: can stored vectors be kept?

    `new_queries`: queries of this release in vectors of the earlier one; `old_queries`: the reverse. `same_space`: both
    releases have the same graph, weights and preprocessing for images, and so the same image embeddings.
    """

    against: str
    images: int
    mean_cosine: float
    min_cosine: float
    new_queries: Agreement
    old_queries: Agreement
    same_space: bool
    reindex: str


@dataclass(frozen=True, kw_only=True)
class Gaps:
    """The cost of merging and freezing on one task: G1 in logits, G2 and G3 as accuracy differences on `images` test images.

    G2 and G3 are None if the experts were fixed before the end of training; G3 also for a sparse gate, which determines the
    number of merged experts itself.
    """

    G1: float
    G1_top1_agreement: float
    G2: float | None = None
    G2_batch_32: float | None = None
    G3: float | None = None
    images: int = 0
    accuracies: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Guard:
    """How `train.guard` changed a task: the update's `scale`, and the estimated loss of zero-shot accuracy in percentage points,
    of the whole update and of what was kept, with the `limit` that was set.
    """

    limit: float
    scale: float
    whole: float
    kept: float


@dataclass(frozen=True, kw_only=True)
class RunGaps:
    """The largest G1, the means of G2 and G3, and the gaps of each task."""

    G1: float
    G2: float | None
    G3: float | None
    tasks: Mapping[str, Gaps]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Accuracy on a task that is never trained: of the base model, then after each task."""

    name: str
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Accuracies as fractions. `matrix[i][j]`: on task j after task i. The summary belongs to a whole run."""

    tasks: tuple[str, ...]
    zero_shot: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]
    zero_shot_avg: float | None = None
    transfer: float | None = None
    avg: float | None = None
    last: float | None = None
    forgetting: tuple[float, ...] = ()
    probe: Probe | None = None


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


def named_checks(group: Any) -> Iterator[tuple[str, Check]]:
    """The checks of a result type by the names of their fields."""
    for f in fields(group):
        yield f.name, getattr(group, f.name)


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
