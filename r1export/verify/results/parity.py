"""The results of parity: three stages, each with the figures that decide it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from r1export.verify.results.check import Check, Verdict, overall

PARITY_STAGES = ("merge", "export", "total")


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
