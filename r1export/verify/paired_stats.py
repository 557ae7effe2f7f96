"""Paired timing: mean log-ratio without outliers, its interval, equivalence.

Ratios are compared as logarithms, so that twice as slow and twice as fast have equal weight. Rounds with the same sessions
share their memory placement and are not independent, so the median of a block's rounds is one observation. Of ten blocks or
more a tenth at each end is left out: a session that got small pages, or a block in which one contender alone was disturbed, is
not what a release costs, and would widen the interval for good. The standard error of the rest is Yuen's (1974), from the
Winsorized variance.
Equivalence (two one-sided tests, Schuirmann 1987) holds where the interval lies inside the margin; the 95 % interval
used here is stricter than the 90 % interval that the test at the 5 % level needs.
"""

from __future__ import annotations

import numpy as np

from r1export.verify.results import Ratio, Verdict

TRIMMED = 10  # one block in so many is left out at each end
NORMAL_95 = 1.96  # standard errors of a 95 % interval
EARLY = 3.0  # standard errors within the margin that end timing early


def paired_ratio(numerator: np.ndarray, denominator: np.ndarray) -> Ratio:
    """Ratio of two series of times, both (blocks, rounds), measured round by round, with its 95 % interval.

    The estimate is the trimmed mean over the blocks of each block's median log-ratio.
    """
    centre, reach = _estimate(numerator, denominator, NORMAL_95)
    value, low, high = (float(np.exp(log)) for log in (centre, centre - reach, centre + reach))
    return Ratio(value, (low, high))


def within_by(errors: float, numerator: np.ndarray, denominator: np.ndarray, margin: float) -> bool:
    """Whether the ratio of two series (blocks, rounds) is within a factor of 1 + margin by so many standard errors.

    They are those of a normal distribution with known spread; `student` makes them more, as the spread is estimated from the
    blocks. Three are the boundary of Haybittle (1971) and Peto et al. (1976) for looking at data before they are complete: it
    is so strict that looking several times hardly adds to the error of the interval that is looked at last.
    """
    centre, reach = _estimate(numerator, denominator, errors)
    return bool(abs(centre) + reach < np.log1p(margin))


def _estimate(numerator: np.ndarray, denominator: np.ndarray, errors: float) -> tuple[float, float]:
    """The trimmed mean of the blocks' log-ratios, and so many of its standard errors; infinitely many of a single block."""
    logs = np.sort(np.median(np.log(numerator) - np.log(denominator), axis=1))
    count, cut = len(logs), len(logs) // TRIMMED
    kept = logs[cut : count - cut]
    if count < 2:
        return float(logs.mean()), np.inf
    winsorized = np.clip(logs, kept[0], kept[-1])
    error = np.sqrt(((winsorized - winsorized.mean()) ** 2).sum() / (len(kept) * (len(kept) - 1)))
    return float(kept.mean()), float(student(errors, len(kept) - 1) * error)


def student(z: float, freedom: int) -> float:
    """The quantile of Student's t with so many degrees of freedom at the probability at which that of a normal is `z`.

    The expansion of Abramowitz and Stegun (1964), 26.7.5: within 1 % for z = 3 and 4 degrees.
    """
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(sum(term / freedom**power for power, term in enumerate(terms)))


def latency_verdict(merged: Ratio, noise: Ratio, margin: float) -> tuple[Verdict, str]:
    """The verdict on added latency, with advice if it is not a pass.

    If the noise floor (base vs. base) exceeds the margin, the result is inconclusive regardless of the merged model.
    """
    low, high = merged.ci95
    if not noise.within(margin):
        return Verdict.INCONCLUSIVE, (
            f"the noise (base vs. base) is {noise.ci95[0]:.3f} to {noise.ci95[1]:.3f}: close other programs, pin threads, "
            "or raise verify.pairs"
        )
    if low > 1 + margin:
        return Verdict.FAIL, f"the merged model's latency is at least {low:.3f} times the base model's"
    if high < 1 / (1 + margin):
        return Verdict.INCONCLUSIVE, (
            f"the merged model's latency is at most {high:.3f} times the base model's, but an identical graph can't be "
            "faster by more than the margin: find out what disturbed the base and verify again"
        )
    if not merged.within(margin):
        return (
            Verdict.INCONCLUSIVE,
            f"the interval {low:.3f} to {high:.3f} is wider than the margin: raise verify.pairs",
        )
    return Verdict.PASS, ""
