"""Time base and release in turn in one process.

Each block opens fresh sessions (where weights lie in memory alone can make one session a few percent slower for its
whole life); each round runs the contenders in a random order and then in reverse, which cancels drift.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from r1export.verify.paired_stats import latency_verdict, paired_ratio
from r1export.verify.results import Latency, ProviderLatency, Ratio, Times, Verdict, overall

WARM_UP = 3  # runs after opening a session that are not counted: memory is planned and weights are paged in
P90_COUNT, P99_COUNT = 50, 500  # runs that a quantile needs before it says anything
TORCH_ROUNDS = 6
PAIR_RATIOS = 400  # single pairs that a report keeps for its picture
Job = Callable[[], object]
Opener = Callable[[], Job]
Clock = Callable[[], float]


@dataclass(frozen=True)
class TimingBudget:
    """How long to time.

    blocks         a bootstrap over fewer than ten has intervals that are too narrow
    fewest_rounds  per block, of a model so slow that `seconds` is used up before: a median needs a few
    seconds        that the rounds of the first `blocks` may take together
    patience       seconds after these in which blocks are added; half as long again as they took, if that is longer
    precision      intervals are narrowed to this part of the margin: an equal pair then lies outside once in 10^4 times
    """

    blocks: int = 10
    fewest_rounds: int = 4
    seconds: float = 40.0
    patience: float = 20.0
    precision: float = 3.0


DEFAULT_BUDGET = TimingBudget()


@dataclass(frozen=True)
class Precision:
    """When to stop: at least `pairs` pairs, and all intervals narrower than `halfwidth` (in logarithms)."""

    pairs: int
    halfwidth: float


RELATIVE = Precision(80, 0.05)  # two programs compared, not proven equal


@dataclass(frozen=True)
class Contenders:
    """What is timed on one provider: base and release, and next to them the unmerged graph and torch where there are any."""

    provider: str
    base: Opener
    release: Opener
    unmerged: Opener | None = None
    torch: Mapping[str, Job] | None = None


def time_rounds(
    jobs: Mapping[str, Job], rounds: int, rng: np.random.Generator, clock: Clock | None = None
) -> dict[str, np.ndarray]:
    """Seconds per round (rounds,) of each job, the mean of its two runs in the round."""
    return {name: runs.mean(-1) for name, runs in time_runs(jobs, rounds, rng, clock).items()}


def time_runs(
    jobs: Mapping[str, Job], rounds: int, rng: np.random.Generator, clock: Clock | None = None
) -> dict[str, np.ndarray]:
    """Seconds (rounds, 2) of each job's two runs in every round; `clock` is the wall clock if not given."""
    clock = clock or time.perf_counter
    for job in jobs.values():
        for _ in range(WARM_UP):
            job()
    seconds = {name: np.zeros((rounds, 2)) for name in jobs}
    for i in range(rounds):
        order = rng.permutation(list(jobs))
        for turn, names in enumerate((order, order[::-1])):
            for name in names:
                start = clock()
                jobs[name]()
                seconds[name][i, turn] = clock() - start
    return seconds


def measure(
    openers: Mapping[str, Opener], wanted: Precision, budget: TimingBudget, on_block: Callable[[], None] = lambda: None
) -> dict[str, np.ndarray]:
    """Seconds (blocks, rounds, 2) of "base" and whatever is compared with it, all opened afresh in every block.

    After the pairs that are wanted, or as many as fit into the budget, it goes on until all intervals are narrow enough or
    its patience is at an end. How long it goes on depends on the width of the intervals, not on where they lie, so it
    favours no verdict.
    """
    rng, rounds = np.random.default_rng(0), max(2, -(-wanted.pairs // (2 * budget.blocks)))
    started, deadline = time.perf_counter(), None
    blocks: list[dict[str, np.ndarray]] = []
    while True:
        jobs = {str(name): openers[str(name)]() for name in rng.permutation(list(openers))}
        if not blocks:
            rounds = min(rounds, _affordable_rounds(jobs, budget))
        blocks.append(time_runs(jobs, rounds, rng))
        on_block()
        if len(blocks) < budget.blocks:
            continue
        now = time.perf_counter()
        deadline = deadline or now + max(budget.patience, (now - started) / 2)
        seconds = {name: np.stack([block[name] for block in blocks]) for name in openers}
        widest = max(_paired(seconds, name).halfwidth for name in openers if name != "base")
        if widest <= wanted.halfwidth or now > deadline:
            return seconds


def _affordable_rounds(jobs: Mapping[str, Job], budget: TimingBudget) -> int:
    """How many rounds of a block fit into the budget, from one that is not counted."""
    started = time.perf_counter()
    for job in (*jobs.values(), *jobs.values()):
        job()
    return max(budget.fewest_rounds, int(budget.seconds / budget.blocks / max(time.perf_counter() - started, 1e-9)))


def added_latency(
    contenders: Contenders, pairs: int, margin: float, budget: TimingBudget, on_block: Callable[[], None] = lambda: None
) -> Latency:
    """Rung L5 on one provider: the release against the base, and base against itself as noise floor.

    The unmerged model and torch are for comparison. `contenders.torch` is named as in the report's table of models.
    """
    openers = {"base": contenders.base, "again": contenders.base, "merged": contenders.release}
    seconds = measure(openers, Precision(pairs, margin / budget.precision), budget, on_block)
    ratio, noise = _paired(seconds, "merged"), _paired(seconds, "again")
    verdict, detail = latency_verdict(ratio, noise, margin)
    times = {name: _times(seconds[name]) for name in ("base", "merged")}
    others, unmerged_ratio = _comparisons(contenders, budget)
    provider = contenders.provider
    return Latency(
        verdict=verdict,
        looked_at=1,
        of=1,
        detail=detail,
        ratio=ratio.ratio,
        ci95=ratio.ci95,
        margin=margin,
        noise_floor=noise,
        unmerged_ratio=unmerged_ratio,
        pairs=int(seconds["base"].size),
        pair_ratios=tuple((seconds["merged"].mean(-1) / seconds["base"].mean(-1)).ravel().tolist()[:PAIR_RATIOS]),
        providers={provider: {"1": times | others}},
        by_provider={provider: ProviderLatency(verdict=verdict, ratio=ratio.ratio, ci95=ratio.ci95, noise_floor=noise)},
    )


def _comparisons(contenders: Contenders, budget: TimingBudget) -> tuple[dict[str, Times], float | None]:
    """Times of the unmerged graph and of torch, and the ratio of an unmerged model to the base.

    Apart from the pairs that decide, which have to be narrow: here a difference is expected, and torch's own threads spin
    for a while after each call and would slow whatever is timed next.
    """
    times: dict[str, Times] = {}
    ratio = None
    if contenders.unmerged:
        seconds = measure({"base": contenders.base, "unmerged": contenders.unmerged}, RELATIVE, budget)
        times["unmerged"], ratio = _times(seconds["unmerged"]), _paired(seconds, "unmerged").ratio
    if contenders.torch:
        seconds = time_runs({"base": contenders.base(), **contenders.torch}, TORCH_ROUNDS, np.random.default_rng(1))
        times |= {name: _times(seconds[name]) for name in contenders.torch}
        if ratio is None and "unmerged_torch" in contenders.torch:
            ratio = float(np.median(seconds["unmerged_torch"].mean(-1) / seconds["base"].mean(-1)))
    return times, ratio


def relative_time(base: Opener, other: Opener, budget: TimingBudget) -> Ratio:
    """Time of another program over the time of the base, where a difference is expected."""
    return _paired(measure({"base": base, "other": other}, RELATIVE, budget), "other")


def slowest(by_provider: Sequence[Latency], tower: str) -> Latency:
    """One result for several providers: the figures of the worst, ratios and tables of all."""
    if not by_provider:
        return Latency.not_applicable("no provider was asked for that can be timed")
    order = (Verdict.PASS, Verdict.INCONCLUSIVE, Verdict.FAIL)
    worst = max(by_provider, key=lambda latency: (order.index(latency.verdict), latency.ratio))
    return replace(
        worst,
        verdict=overall(latency.verdict for latency in by_provider),
        looked_at=len(by_provider),
        of=len(by_provider),
        tower=tower,
        providers={name: table for latency in by_provider for name, table in (latency.providers or {}).items()},
        by_provider={name: one for latency in by_provider for name, one in (latency.by_provider or {}).items()},
    )


def _paired(seconds: Mapping[str, np.ndarray], name: str) -> Ratio:
    """A contender against the base, round by round: the two runs of a round are one figure, in which drift cancels."""
    return paired_ratio(seconds[name].mean(-1), seconds["base"].mean(-1))


def _times(seconds: np.ndarray) -> Times:
    """Quantiles of single runs: what a client waits for once is not the mean of two."""
    values = 1000 * seconds.ravel()
    p90, p99 = (
        float(np.quantile(values, quantile)) if len(values) >= count else None
        for quantile, count in ((0.90, P90_COUNT), (0.99, P99_COUNT))
    )
    return Times(median_ms=float(np.median(values)), p90_ms=p90, p99_ms=p99, n=len(values))
