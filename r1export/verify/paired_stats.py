"""Paired timing: median log-ratio, block bootstrap interval, equivalence.

Ratios are compared as logarithms, so that twice as slow and twice as fast have equal weight. Rounds with the same sessions
share their memory placement and are not independent, so the bootstrap resamples whole blocks of rounds.
Equivalence (two one-sided tests, Schuirmann 1987) holds where the interval lies inside the margin; the 95 % interval
used here is stricter than the 90 % interval that the test at the 5 % level needs.
"""

from __future__ import annotations

import numpy as np

from r1export.verify.results import Ratio, Verdict

RESAMPLES = 2000
NORMAL_95 = 1.96  # standard errors of a 95 % interval
EARLY = 3.0  # standard errors within the margin that end timing early


def paired_ratio(numerator: np.ndarray, denominator: np.ndarray, seed: int = 0) -> Ratio:
    """Ratio of two series of times, both (blocks, rounds), measured round by round.

    The estimate is the mean over the blocks of each block's median log-ratio.
    """
    medians = _block_medians(numerator, denominator)
    draws = np.random.default_rng(seed).integers(len(medians), size=(RESAMPLES, len(medians)))
    low, high = np.quantile(medians[draws].mean(1), [0.025, 0.975])
    # Resampling n blocks underestimates their spread by sqrt((n - 1) / n), and that spread is itself estimated from n blocks.
    freedom = max(1, len(medians) - 1)
    widen = np.sqrt(len(medians) / freedom) * student(NORMAL_95, freedom) / NORMAL_95
    centre = medians.mean()
    value, low, high = (float(np.exp(centre + (edge - centre) * widen)) for edge in (centre, low, high))
    return Ratio(value, (low, high))


def within_by(errors: float, numerator: np.ndarray, denominator: np.ndarray, margin: float) -> bool:
    """Whether the ratio of two series (blocks, rounds) is within a factor of 1 + margin by so many standard errors.

    They are those of a normal distribution with known spread; `student` makes them more, as the spread is estimated from the
    blocks. Three are the boundary of Haybittle (1971) and Peto et al. (1976) for looking at data before they are complete: it
    is so strict that looking several times hardly adds to the error of the interval that is looked at last.
    """
    medians = _block_medians(numerator, denominator)
    if len(medians) < 2:
        return False
    reach = student(errors, len(medians) - 1) * medians.std(ddof=1) / np.sqrt(len(medians))
    return bool(abs(medians.mean()) + reach < np.log1p(margin))


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


def _block_medians(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.asarray(np.median(np.log(numerator) - np.log(denominator), axis=1))


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
