"""Time the base and one or several releases in one process.

Each block opens fresh sessions, because the memory placement of weights can make one session a few percent slower for its
whole life. Within a block the contenders run in turn, each round in random order and then in reverse, which cancels drift;
those whose runs are long run at the same time on one core instead, where that can be timed (`concurrent_runs`). All clocks are
read around every run, and the clock with the lowest noise (base vs. base) decides the verdicts.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from r1export.verify.clocks import WALL, Clocks, Meter, wall_clock
from r1export.verify.concurrent_runs import OpenMeter, time_together
from r1export.verify.paired_stats import EARLY, NORMAL_95, latency_verdict, paired_ratio, within_by
from r1export.verify.results import ClockRatios, Latency, ProviderLatency, Ratio, Times, Verdict, overall

LONG_RUN = 0.01  # seconds, a few slices of the scheduler: what disturbs the core lasts about as long
WARM_UP = 1  # uncounted run after opening a session: weights are paged in and memory is planned
P90_COUNT, P99_COUNT = 50, 500  # runs needed for a quantile
TORCH_ROUNDS, TORCH_SECONDS = 3, 1.0  # shown beside the verdict
PAIR_RATIOS = 400  # single rounds that a report stores for its plot
BASE, AGAIN = "base", "again"  # the base is timed twice, for the noise floor
CONTROL_BLOCKS = 5  # blocks in which unmerged models are timed: they are far from the base, so few blocks suffice
Job = Callable[[], object]
Opener = Callable[[], Job]
Clock = Callable[[], float | tuple[float, ...]]
TimeBlock = Callable[[Mapping[str, Job], int, np.random.Generator], dict[str, np.ndarray]]


@dataclass(frozen=True)
class TimingBudget:
    """How long to time, in seconds of wall-clock time (with processor-time clocks, in seconds of that).

    blocks         after which the width of the intervals can end timing
    first_look     blocks after which clear results can end it
    fewest_rounds  per block in turn, of a model so slow that `seconds` is used up before: a median needs a few
    seconds        that the rounds of one contender in the first `blocks` may take together
    patience       seconds after these in which blocks are added; half as long again as they took, if that is longer; 0: none
    precision      intervals are narrowed to this part of the margin: an equal pair then lies outside once in 10^4 times
    """

    blocks: int = 10
    first_look: int = 5
    fewest_rounds: int = 2
    seconds: float = 3.0
    patience: float = 40.0
    precision: float = 3.0


DEFAULT_BUDGET = TimingBudget()
SHOWN = TimingBudget(blocks=3, fewest_rounds=1, seconds=0.75, patience=0.0)  # wall clock where it doesn't decide


@dataclass(frozen=True)
class Precision:
    """When to stop: after `pairs` pairs, and once all intervals are narrower than `halfwidth` (in logarithms).

    With a `margin` also before, as soon as all releases are within it by EARLY standard errors and the base against itself by
    those of the verdict.
    """

    pairs: int
    halfwidth: float
    margin: float = 0.0


RELATIVE = Precision(80, 0.05)  # two different programs, not expected to be equal


@dataclass(frozen=True)
class Readings:
    """Clock readings (blocks, rounds, 2, clocks) of each contender: seconds, or cycles and instructions.

    Unmerged models have the first blocks only.
    """

    clocks: Clocks
    counts: Mapping[str, np.ndarray]

    def by(self, clock: str) -> dict[str, np.ndarray]:
        """(blocks, rounds, 2) of each contender by one clock."""
        return {name: values[..., self.clocks.names.index(clock)] for name, values in self.counts.items()}

    def ratios(self, clock: str) -> dict[str, Ratio]:
        """Every contender vs. base by one clock."""
        counts = self.by(clock)
        return {name: paired_ratio(*pairs_of(counts, name)) for name in counts if name != BASE}

    @property
    def steadiest(self) -> str:
        """The deciding clock: the one with the lowest noise (base vs. base), regardless of the other contenders."""
        return min(self.clocks.deciding, key=lambda clock: paired_ratio(*pairs_of(self.by(clock), AGAIN)).halfwidth)


Measure = Callable[[Precision, TimingBudget, Callable[[], None]], Readings]


@dataclass(frozen=True)
class Contenders:
    """The contenders on one provider: the base, releases by name, and the unmerged model of those that have one.

    `steady` measures all of them by clocks with less noise than the wall clock, if available; the wall clock is then only
    shown.
    """

    provider: str
    base: Opener
    releases: Mapping[str, Opener]
    unmerged: Mapping[str, Opener] = field(default_factory=dict)
    steady: Measure | None = None

    @property
    def openers(self) -> dict[str, Opener]:
        """The graphs by name; the base twice, for the noise floor."""
        controls = {control_of(name): opener for name, opener in self.unmerged.items()}
        return {BASE: self.base, AGAIN: self.base} | dict(self.releases) | controls

    @property
    def controls(self) -> frozenset[str]:
        """The names of the unmerged models among `openers`."""
        return frozenset(map(control_of, self.unmerged))


def control_of(release: str) -> str:
    """The name of a release's unmerged model among the contenders."""
    return f"{release} unmerged"


def time_rounds(
    jobs: Mapping[str, Job], rounds: int, rng: np.random.Generator, clock: Clock | None = None
) -> dict[str, np.ndarray]:
    """Seconds per round (rounds,) of each job, the mean of its two runs in the round."""
    return {name: runs.mean(1) for name, runs in time_runs(jobs, rounds, rng, clock).items()}


def time_runs(
    jobs: Mapping[str, Job], rounds: int, rng: np.random.Generator, clock: Clock | None = None
) -> dict[str, np.ndarray]:
    """Readings of `clock` (rounds, 2) for each job's two runs of every round; (rounds, 2, clocks) for several clocks.

    Defaults to the wall clock.
    """
    clock = clock or time.perf_counter
    _warm_up(jobs)
    counts = {name: np.zeros((rounds, 2, *np.shape(clock()))) for name in jobs}
    for i in range(rounds):
        order = rng.permutation(list(jobs))
        for turn, names in enumerate((order, order[::-1])):
            for name in names:
                start = clock()
                jobs[name]()
                counts[name][i, turn] = np.subtract(clock(), start)
    return counts


def _warm_up(jobs: Mapping[str, Job]) -> None:
    for job in jobs.values():
        for _ in range(WARM_UP):
            job()


def together(open_meter: OpenMeter) -> TimeBlock:
    """Times the rounds of a block while all jobs run at the same time: each round has the next two runs of each."""

    def time_block(jobs: Mapping[str, Job], rounds: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        _warm_up(jobs)
        readings = time_together(jobs, 2 * rounds, rng, open_meter)
        return {name: runs.reshape(rounds, 2, -1) for name, runs in readings.items()}

    return time_block


def measure(
    openers: Mapping[str, Opener],
    wanted: Precision,
    budget: TimingBudget,
    on_block: Callable[[], None] = lambda: None,
    meter: Meter | None = None,
    controls: Collection[str] = (),
    time_long_runs: TimeBlock | None = None,
) -> Readings:
    """Time "base" and the other contenders, with fresh sessions in every block; by the wall clock without a `meter`.

    `time_long_runs` times blocks of models whose run takes LONG_RUN or more, by the clocks of the meter; by default in turn.

    `controls` are timed in the first CONTROL_BLOCKS blocks. Timing ends early if the results are clear. After the requested
    pairs, or as many as fit in the budget, it continues until the other contenders are known well enough by one of the deciding
    clocks, or the patience is used up. Stopping early needs a pass at three standard errors (`within_by`); stopping otherwise
    depends on the width of the intervals, not on their position, so neither biases the verdict.
    """
    meter = meter or wall_clock()
    rounds = max(2, -(-wanted.pairs // (2 * budget.blocks)))
    started, deadline = meter.elapsed(), None
    decisive = [name for name in openers if name != BASE and name not in controls]
    blocks: list[dict[str, np.ndarray]] = []
    enough = min(budget.blocks, budget.first_look) if wanted.margin else budget.blocks
    for block in _blocks(openers, controls, rounds, budget, meter, time_long_runs):
        blocks.append(block)
        on_block()
        if len(blocks) < enough:
            continue
        enough = len(blocks) + max(1, len(blocks) // 5)  # each look can err, and late blocks change little
        counts = {name: np.stack([block[name] for block in blocks if name in block]) for name in openers}
        readings = Readings(meter.clocks, counts)
        by_clock = [readings.by(clock) for clock in meter.clocks.deciding]
        if any(_clear(times, decisive, wanted.margin) for times in by_clock):
            break
        if len(blocks) < budget.blocks:
            continue
        now = meter.elapsed()
        deadline = deadline or now + (max(budget.patience, (now - started) / 2) if budget.patience else 0.0)
        if now >= deadline or any(_precise(times, decisive, wanted.halfwidth) for times in by_clock):
            break
    return readings


def _blocks(
    openers: Mapping[str, Opener],
    controls: Collection[str],
    rounds: int,
    budget: TimingBudget,
    meter: Meter,
    time_long_runs: TimeBlock | None,
) -> Iterator[dict[str, np.ndarray]]:
    """Blocks without end, each with fresh sessions; of a slow model fewer `rounds`, as many as fit in the budget."""
    rng, fewest = np.random.default_rng(0), budget.fewest_rounds
    time_block: TimeBlock = partial(time_runs, clock=meter.read)
    for number in itertools.count():
        timed = [name for name in openers if name not in controls or number < CONTROL_BLOCKS]
        jobs = {str(name): openers[str(name)]() for name in rng.permutation(timed)}
        if not number:
            seconds = seconds_a_run(jobs, meter)
            if time_long_runs and seconds >= LONG_RUN:
                time_block, fewest = time_long_runs, 1  # at the same time one round has less noise than several in turn
            rounds = min(rounds, max(fewest, int(budget.seconds / (2 * budget.blocks * seconds))))
        block = time_block(jobs, rounds, rng)
        jobs.clear()  # closes the sessions before the next ones are opened
        yield block


def _clear(counts: Mapping[str, np.ndarray], decisive: Sequence[str], margin: float) -> bool:
    """Whether one clock shows all `decisive` contenders within the margin without doubt.

    The base against itself needs no more than its verdict, since it is one program: looking often can't make it pass wrongly.
    """
    errors = {name: NORMAL_95 if name == AGAIN else EARLY for name in decisive}
    return bool(margin) and all(within_by(errors[name], *pairs_of(counts, name), margin) for name in decisive)


def _precise(counts: Mapping[str, np.ndarray], decisive: Sequence[str], halfwidth: float) -> bool:
    """Whether one clock gives all `decisive` contenders intervals of this width or less."""
    return all(paired_ratio(*pairs_of(counts, name)).halfwidth <= halfwidth for name in decisive)


def seconds_a_run(jobs: Mapping[str, Job], meter: Meter) -> float:
    """How long a run takes, of all jobs on average, from two uncounted runs of each."""
    started = meter.elapsed()
    for job in (*jobs.values(), *jobs.values()):
        job()
    return max(meter.elapsed() - started, 1e-9) / (2 * len(jobs))


def added_latency(
    contenders: Contenders, pairs: int, margin: float, budget: TimingBudget, on_block: Callable[[], None] = lambda: None
) -> dict[str, Latency]:
    """Rung L5 of each release on one provider: release vs. base, base vs. base as the noise floor, the unmerged model to compare."""
    wanted = Precision(pairs, margin / budget.precision, margin)
    if contenders.steady:
        deciding = contenders.steady(wanted, budget, on_block)
        wall = _by_wall_clock(contenders, RELATIVE, replace(SHOWN, seconds=min(SHOWN.seconds, budget.seconds)))
    else:
        deciding = wall = _by_wall_clock(contenders, wanted, budget, on_block)
    return {name: _latency(name, contenders.provider, deciding, wall, margin) for name in contenders.releases}


def _by_wall_clock(
    contenders: Contenders, wanted: Precision, budget: TimingBudget, on_block: Callable[[], None] = lambda: None
) -> Readings:
    return measure(contenders.openers, wanted, budget, on_block, controls=contenders.controls)


def _latency(release: str, provider: str, deciding: Readings, wall: Readings, margin: float) -> Latency:
    clock = deciding.steadiest
    clocks = {
        name: clock_ratios(readings, name, release) for readings in (deciding, wall) for name in readings.clocks.names
    }
    ratio, noise, unmerged = clocks[clock].merged, clocks[clock].noise, clocks[clock].unmerged
    verdict, detail = latency_verdict(ratio, noise, margin)
    merged, base = pairs_of(deciding.by(clock), release)
    return Latency(
        verdict=verdict,
        looked_at=1,
        of=1,
        detail=detail,
        clock=clock,
        ratio=ratio.ratio,
        ci95=ratio.ci95,
        margin=margin,
        noise_floor=noise,
        unmerged_ratio=unmerged.ratio if unmerged else None,
        pairs=_pairs(deciding, clock),
        pair_ratios=tuple((merged / base).ravel().tolist()[:PAIR_RATIOS]),
        providers={provider: {"1": _times_of(wall, release)}},
        by_provider={
            provider: ProviderLatency(
                verdict=verdict, ratio=ratio.ratio, ci95=ratio.ci95, noise_floor=noise, clock=clock, clocks=clocks
            )
        },
        uncounted=deciding.clocks.uncounted,
    )


def clock_ratios(readings: Readings, clock: str, release: str) -> ClockRatios:
    """The ratios of one clock."""
    ratios = readings.ratios(clock)
    return ClockRatios(
        merged=ratios[release],
        noise=ratios[AGAIN],
        unmerged=ratios.get(control_of(release)),
        threads=readings.clocks.threads,
        pairs=_pairs(readings, clock),
    )


def _pairs(readings: Readings, clock: str) -> int:
    """How many runs of the base, and so of every release, the ratios of a clock come from."""
    return int(readings.by(clock)[BASE].size)


def _times_of(wall: Readings, release: str) -> dict[str, Times]:
    """Times of the graphs by the wall clock: the latency of a client."""
    values, names = wall.by(WALL), {"base": BASE, "merged": release, "unmerged": control_of(release)}
    return {row: _times(values[name]) for row, name in names.items() if name in values}


def torch_times(jobs: Mapping[str, Job]) -> dict[str, Times]:
    """Times of torch, measured separately: its threads spin for a while after each call and would slow the next contender.

    TORCH_ROUNDS, or one of models whose rounds take longer than TORCH_SECONDS.
    """
    rng = np.random.default_rng(1)
    parts = [time_runs(jobs, 1, rng)]
    if sum(values.sum() for values in parts[0].values()) <= TORCH_SECONDS:
        parts.append(time_runs(jobs, TORCH_ROUNDS - 1, rng))
    return {name: _times(np.concatenate([part[name] for part in parts])) for name in jobs}


def relative_time(base: Opener, other: Opener, budget: TimingBudget) -> Ratio:
    """Latency ratio of another program to the base, where a difference is expected."""
    return measure({BASE: base, "other": other}, RELATIVE, budget).ratios(WALL)["other"]


def slowest(by_provider: Sequence[Latency], tower: str) -> Latency:
    """One result for several providers: the figures of the worst, ratios and tables of all."""
    if not by_provider:
        return Latency.not_applicable("none of the requested providers can be timed")
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


def pairs_of(counts: Mapping[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(blocks, rounds) of a contender and of the base: the runs of a round are averaged, which cancels drift.

    The base's second session counts as well, except against itself: the mean of two sessions has less noise than one.
    """
    base = counts[BASE]
    if name != AGAIN and AGAIN in counts:
        base = (base + counts[AGAIN]) / 2
    own = counts[name].mean(-1)
    return own, base.mean(-1)[: len(own)]


def _times(seconds: np.ndarray) -> Times:
    """Quantiles of single runs, since a client waits for one run, not for the mean of two."""
    values = 1000 * seconds.ravel()
    p90, p99 = (
        float(np.quantile(values, quantile)) if len(values) >= count else None
        for quantile, count in ((0.90, P90_COUNT), (0.99, P99_COUNT))
    )
    return Times(median_ms=float(np.median(values)), p90_ms=p90, p99_ms=p99, n=len(values))
