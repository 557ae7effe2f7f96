"""Time base and release side by side in one process.

Each block opens fresh sessions (where weights lie in memory alone can make one session a few percent slower for its
whole life); each round runs the contenders in a random order and then in reverse, which cancels drift.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from r1export.verify.paired_stats import Ratio, latency_verdict, paired_ratio

BLOCKS = 10  # a bootstrap over fewer blocks has intervals that are too narrow
WARM_UP = 3  # runs after opening a session that are not counted: memory is planned and weights are paged in
P90_COUNT, P99_COUNT = 50, 500  # runs that a quantile needs before it says anything
TORCH_ROUNDS = 6
RELATIVE_PAIRS, RELATIVE_HALFWIDTH = 80, 0.05  # two programs compared, not proven equal
FEWEST_ROUNDS = 4  # per block, of a model so slow that BUDGET is used up before: a median needs a few
BUDGET = 40.0  # seconds that the rounds of the first BLOCKS may take together
PATIENCE = 20.0  # seconds after these in which blocks are added; half as long again as they took, if that is longer
PRECISION = 3  # intervals are narrowed to this part of the margin: an equal pair then lies outside once in 10^4 times
Job = Callable[[], object]


def time_rounds(
    jobs: Mapping[str, Job], rounds: int, rng: np.random.Generator, clock: Callable[[], float] | None = None
) -> dict[str, np.ndarray]:
    """Seconds per round (rounds,) of each job, the mean of its two runs in the round."""
    return {name: runs.mean(-1) for name, runs in time_runs(jobs, rounds, rng, clock).items()}


def time_runs(
    jobs: Mapping[str, Job], rounds: int, rng: np.random.Generator, clock: Callable[[], float] | None = None
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
    openers: Mapping[str, Callable[[], Job]],
    pairs: int,
    halfwidth: float,
    seed: int = 0,
    on_block: Callable[[], None] = lambda: None,
) -> dict[str, np.ndarray]:
    """Seconds (blocks, rounds, 2) of base and whatever is to be held against it, all opened afresh in every block.

    After `pairs` pairs, or as many as fit into BUDGET, it goes on until all intervals are narrower than `halfwidth` or
    PATIENCE is at its end. How long it goes on depends on the width of the intervals, not on where they lie, so it favours
    no verdict.
    """
    rng, rounds = np.random.default_rng(seed), max(2, -(-pairs // (2 * BLOCKS)))
    started, deadline = time.perf_counter(), None
    blocks: list[dict[str, np.ndarray]] = []
    while True:
        jobs = {str(name): openers[str(name)]() for name in rng.permutation(list(openers))}
        if not blocks:
            rounds = min(rounds, _affordable_rounds(jobs))
        blocks.append(time_runs(jobs, rounds, rng))
        on_block()
        if len(blocks) < BLOCKS:
            continue
        now = time.perf_counter()
        deadline = deadline or now + max(PATIENCE, (now - started) / 2)
        seconds = {name: np.stack([block[name] for block in blocks]) for name in openers}
        widest = max(_paired(seconds, name).halfwidth for name in openers if name != "base")
        if widest <= halfwidth or now > deadline:
            return seconds


def _affordable_rounds(jobs: Mapping[str, Job]) -> int:
    """How many rounds of a block fit into BUDGET, from one that is not counted."""
    started = time.perf_counter()
    for job in (*jobs.values(), *jobs.values()):
        job()
    return max(FEWEST_ROUNDS, int(BUDGET / BLOCKS / max(time.perf_counter() - started, 1e-9)))


def added_latency(
    open_base: Callable[[], Job], open_release: Callable[[], Job], *, pairs: int, margin: float, provider: str = "CPUExecutionProvider",
    open_unmerged: Callable[[], Job] | None = None, torch_jobs: Mapping[str, Job] | None = None, on_block: Callable[[], None] = lambda: None,
) -> dict[str, Any]:  # fmt: skip
    """Rung L5: the release against the base, and base against itself as noise floor; the unmerged model and torch for comparison.

    `open_unmerged` opens the base graph with its branches, `torch_jobs` are named as in the report's table of runners.
    """
    openers = {"base": open_base, "again": open_base, "merged": open_release}
    seconds = measure(openers, pairs, margin / PRECISION, on_block=on_block)
    ratio, noise = _paired(seconds, "merged"), _paired(seconds, "again")
    verdict, advice = latency_verdict(ratio, noise, margin)
    table = {name: _times(seconds[name]) for name in ("base", "merged")}
    unmerged = None
    if open_unmerged:  # Apart from the pairs above, which have to be narrow: here a difference is expected.
        apart = measure({"base": open_base, "unmerged": open_unmerged}, RELATIVE_PAIRS, RELATIVE_HALFWIDTH)
        table["unmerged"], unmerged = _times(apart["unmerged"]), _paired(apart, "unmerged").value
    if torch_jobs:
        # Apart from the pairs above: torch's own threads spin for a while after each call and would slow them.
        compared = time_runs({"base": open_base(), **torch_jobs}, TORCH_ROUNDS, np.random.default_rng(1))
        table |= {name: _times(compared[name]) for name in torch_jobs}
        if unmerged is None and "unmerged_torch" in torch_jobs:
            unmerged = float(np.median(compared["unmerged_torch"].mean(-1) / compared["base"].mean(-1)))
    return {
        "verdict": verdict, "ratio": ratio.value, "ci95": [ratio.low, ratio.high], "margin": margin, "noise_floor": _ratio(noise),
        "unmerged_ratio": unmerged, "pairs": int(seconds["base"].size), "advice": advice,
        "pair_ratios": (seconds["merged"].mean(-1) / seconds["base"].mean(-1)).ravel().tolist()[:400],
        "providers": {provider: {"1": table}},  # by batch size
    }  # fmt: skip


def relative_time(open_base: Callable[[], Job], open_other: Callable[[], Job]) -> dict[str, Any]:
    """Time of another program to the time of the base, where a difference is expected: ratio and interval, no verdict."""
    seconds = measure({"base": open_base, "other": open_other}, RELATIVE_PAIRS, RELATIVE_HALFWIDTH)
    return _ratio(_paired(seconds, "other"))


def slowest(by_provider: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One entry for several providers: the figures of the worst, ratios and tables of all. `by_provider` is not empty."""
    order = ("pass", "inconclusive", "fail")
    worst = max(by_provider, key=lambda found: (order.index(found["verdict"]), found["ratio"]))
    tables = {name: table for found in by_provider for name, table in found["providers"].items()}
    kept = ("verdict", "ratio", "ci95", "noise_floor")
    ratios = {name: {key: found.get(key) for key in kept} for found in by_provider for name in found["providers"]}
    return {**worst, "providers": tables, "by_provider": ratios}


def _paired(seconds: Mapping[str, np.ndarray], name: str) -> Ratio:
    """A contender against the base, round by round: the two runs of a round are one figure, in which drift cancels."""
    return paired_ratio(seconds[name].mean(-1), seconds["base"].mean(-1))


def _ratio(ratio: Ratio) -> dict[str, Any]:
    return {"ratio": ratio.value, "ci95": [ratio.low, ratio.high]}


def _times(seconds: np.ndarray) -> dict[str, Any]:
    """Quantiles of single runs: what a client waits for once is not the mean of two."""
    values = 1000 * seconds.ravel()
    quantiles = {
        f"p{q}_ms": float(np.quantile(values, q / 100)) if len(values) >= count else None
        for q, count in ((90, P90_COUNT), (99, P99_COUNT))
    }
    return {"median_ms": float(np.median(values)), **quantiles, "n": len(values)}
