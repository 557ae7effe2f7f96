"""The results of rung L5: ratios of time by every clock."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from r1export.verify.results.check import Check, Verdict

UNTIMED = "not measured (--no-latency)"


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

    `tower` is the timed tower, `clock` the deciding clock, `pair_ratios` the ratio of each round. `providers` has wall-clock times
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
