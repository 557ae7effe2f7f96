"""Timing, with a clock that only the jobs move: no test here depends on how fast this machine is."""

from __future__ import annotations

import numpy as np
import pytest

from r1export.verify import latency
from r1export.verify.clocks import CYCLES, INSTRUCTIONS, PROCESSOR, WALL, Clocks, Meter
from r1export.verify.latency import CONTROL_BLOCKS, Contenders, Precision, Readings, TimingBudget, measure
from r1export.verify.results import Latency

BUDGET = TimingBudget()


def timed(base, release, pairs: int = 40, unmerged=None, **others) -> Latency:
    controls = {"merged": unmerged} if unmerged else {}
    contenders = Contenders("CPUExecutionProvider", base, {"merged": release}, controls, **others)
    return latency.added_latency(contenders, pairs, 0.02, BUDGET)["merged"]


class Clock:
    """Each job takes as long as it says, plus a drift that grows with every run of any job."""

    def __init__(self, drift: float = 0.0) -> None:
        self.now, self.drift, self.runs = 0.0, drift, 0

    def __call__(self) -> float:
        return self.now

    def job(self, seconds: float):
        def run() -> None:
            self.runs += 1
            self.now += seconds + self.drift * self.runs

        return run


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(latency.time, "perf_counter", clock)
    return clock


def test_a_round_runs_each_job_twice_forth_and_back() -> None:
    clock, order = Clock(), []
    jobs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    latency.time_rounds(jobs, 4, np.random.default_rng(0), clock)
    counted = order[3 * latency.WARM_UP :]
    rounds = [counted[i : i + 6] for i in range(0, 24, 6)]
    assert all(sorted(r[:3]) == list("abc") and r[:3] == r[:2:-1] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1, "the order is drawn anew"


def test_a_steady_drift_of_the_machine_cancels_out() -> None:
    clock = Clock(drift=1e-4)
    seconds = latency.time_rounds(
        {"base": clock.job(1.0), "merged": clock.job(1.0)}, 50, np.random.default_rng(1), clock
    )
    assert np.abs(seconds["merged"] / seconds["base"] - 1).max() < 1e-12


def test_a_merged_model_that_takes_as_long_passes(clock) -> None:
    found = timed(lambda: clock.job(1.0), lambda: clock.job(1.0))
    assert (found.verdict, found.ratio) == ("pass", pytest.approx(1.0))
    assert found.pairs >= 20, "half of those asked for, as it is clear by then"


def test_a_merged_model_that_takes_three_percent_longer_fails(clock) -> None:
    found = timed(lambda: clock.job(1.0), lambda: clock.job(1.03))
    assert (found.verdict, found.ratio) == ("fail", pytest.approx(1.03))


def test_a_base_that_differs_from_itself_decides_nothing(clock) -> None:
    """Every other time it is opened, the base is a tenth slower: where its weights lie in memory, for example."""
    opened = iter(range(10**6))
    found = timed(lambda: clock.job(1.0 + 0.2 * (next(opened) % 2)), lambda: clock.job(1.0))
    assert found.verdict == "inconclusive"
    assert "noise (base vs. base)" in found.detail


def test_every_block_opens_its_sessions_afresh(clock) -> None:
    opened = []
    timed(lambda: opened.append("base") or clock.job(1.0), lambda: opened.append("merged") or clock.job(1.0))
    assert opened.count("base") == 2 * opened.count("merged") >= 2 * BUDGET.first_look


@pytest.mark.parametrize("unit", [0.001, 0.05])
def test_measuring_goes_on_while_intervals_are_wide_until_patience_ends(clock, unit: float) -> None:
    """Sessions that differ from one opening to the next by a third need many blocks."""
    rng = np.random.default_rng(0)

    def noisy():
        return clock.job(unit * float(np.exp(rng.normal(0, 0.3))))

    found = timed(noisy, noisy)
    assert found.verdict == "inconclusive"
    assert found.pairs > 40
    assert BUDGET.patience < clock.now < 1.3 * (BUDGET.patience + 3 * BUDGET.seconds)


def test_without_patience_no_block_is_added_however_wide_the_intervals(clock) -> None:
    rng = np.random.default_rng(0)

    def noisy():
        return clock.job(float(np.exp(rng.normal(0, 0.3))))

    readings = measure({"base": noisy, "again": noisy}, Precision(8, 0.05), TimingBudget(blocks=4, patience=0.0))
    assert len(readings.by(WALL)["again"]) == 4


def test_a_slow_model_gets_fewer_pairs_and_never_too_few_for_a_median(clock) -> None:
    for seconds, rounds in ((0.005, 20), (0.045, 3), (10.0, BUDGET.fewest_rounds)):
        found = timed(lambda s=seconds: clock.job(s), lambda s=seconds: clock.job(s), 400)
        assert found.pairs == 2 * BUDGET.first_look * rounds
        assert found.verdict == "pass"


def test_the_unmerged_model_stands_beside_the_base(clock) -> None:
    found = timed(lambda: clock.job(1.0), lambda: clock.job(1.0), unmerged=lambda: clock.job(1.3))
    assert found.unmerged_ratio == pytest.approx(1.3)
    table = found.providers["CPUExecutionProvider"]["1"]
    assert table["unmerged"].median_ms == pytest.approx(1300)
    assert table["base"].p99_ms is None, "too few runs for a 99th percentile"


@pytest.mark.parametrize(("seconds", "runs"), [(0.1, 6), (2.5, 2)])
def test_torch_runs_less_often_if_its_runs_are_long(clock, seconds: float, runs: int) -> None:
    assert latency.torch_times({"merged_torch": clock.job(seconds)})["merged_torch"].n == runs


def test_the_times_of_torch_are_those_of_single_runs(clock) -> None:
    assert latency.torch_times({"merged_torch": clock.job(2.5)})["merged_torch"].median_ms == pytest.approx(2500)


def test_releases_that_are_timed_together_are_each_compared_with_the_same_base(clock) -> None:
    seconds = {"01": 1.0, "02": 1.05, "03": 1.0}
    releases = {name: (lambda s=s: clock.job(s)) for name, s in seconds.items()}
    controls = {"02": lambda: clock.job(1.4)}
    contenders = Contenders("CPUExecutionProvider", lambda: clock.job(1.0), releases, controls)
    found = latency.added_latency(contenders, 40, 0.02, BUDGET)
    assert {name: (one.verdict, round(one.ratio, 3)) for name, one in found.items()} == {
        "01": ("pass", 1.0), "02": ("fail", 1.05), "03": ("pass", 1.0)
    }  # fmt: skip
    assert [one.unmerged_ratio for one in found.values()] == [None, pytest.approx(1.4), None]


def test_unmerged_models_are_opened_in_the_first_blocks_only(clock) -> None:
    opened = []
    timed(lambda: clock.job(1.0), lambda: clock.job(1.03), unmerged=lambda: opened.append(1) or clock.job(1.3))
    assert len(opened) == CONTROL_BLOCKS < BUDGET.blocks


def test_a_release_is_compared_with_both_sessions_of_the_base_and_the_base_with_itself() -> None:
    counts = {"base": np.full((1, 1, 2), 1.0), "again": np.full((1, 1, 2), 3.0), "merged": np.full((1, 1, 2), 4.0)}
    for name, own, base in (("merged", 4.0, 2.0), ("again", 3.0, 1.0)):
        assert [values.item() for values in latency.pairs_of(counts, name)] == [own, base]


def test_clear_results_end_timing_early_and_others_do_not(clock) -> None:
    """3 % slower is known with certainty here too, but only a pass may end before the requested pairs."""
    passed, failed = (timed(lambda: clock.job(1.0), lambda s=s: clock.job(s)) for s in (1.0, 1.03))
    assert passed.pairs == failed.pairs * BUDGET.first_look // BUDGET.blocks
    assert (passed.verdict, failed.verdict) == ("pass", "fail")


def test_sessions_of_a_block_are_closed_before_the_next_are_opened(clock) -> None:
    """Else twice as much memory is needed."""
    alive, most = set(), []

    class Job:
        def __init__(self) -> None:
            alive.add(id(self))
            most.append(len(alive))

        def __call__(self) -> None:
            clock.now += 1.0

        def __del__(self) -> None:
            alive.discard(id(self))

    timed(Job, Job)
    assert max(most) == 3


def readings(clocks: Clocks, spreads: dict[str, float], slower: float = 1.0) -> Readings:
    """Base, base again and a merged model that takes `slower` times as long, each clock with its spread between blocks."""
    rng = np.random.default_rng(0)
    counts = {
        name: np.stack(
            [
                np.broadcast_to(true * np.exp(rng.normal(0, spreads[c], (12, 1, 1))), (12, 20, 2)).copy()
                for c in clocks.names
            ],
            -1,
        )
        for name, true in (("base", 1.0), ("again", 1.0), ("merged", slower))
    }
    return Readings(clocks, counts)


@pytest.mark.parametrize("slower", [1.0, 1.5])
def test_the_clock_by_which_the_base_differs_least_from_itself_decides_whatever_the_release_did(slower: float) -> None:
    clocks = Clocks((PROCESSOR, CYCLES, INSTRUCTIONS), threads=1)
    for steady in (PROCESSOR, CYCLES):
        spreads = {name: 0.001 if name == steady else 0.01 for name in clocks.names}
        assert readings(clocks, spreads, slower).steadiest == steady


def test_instructions_never_decide_as_they_do_not_see_what_makes_each_of_them_slower() -> None:
    clocks = Clocks((PROCESSOR, INSTRUCTIONS), threads=1)
    assert readings(clocks, {PROCESSOR: 0.1, INSTRUCTIONS: 0.0}).steadiest == PROCESSOR


def test_the_verdict_rests_on_the_steady_clock_and_the_wall_clock_keeps_its_row(clock) -> None:
    """A wall clock that is disturbed says that the release is slower; its processor time is that of the base."""
    steady = readings(Clocks((PROCESSOR,), threads=1, uncounted="no such counter"), {PROCESSOR: 0.001})
    found = timed(lambda: clock.job(1.0), lambda: clock.job(1.3), steady=lambda *_: steady)
    assert (found.verdict, found.clock, found.uncounted) == ("pass", PROCESSOR, "no such counter")
    rows = found.by_provider["CPUExecutionProvider"].clocks
    assert (rows[PROCESSOR].threads, rows[WALL].threads) == (1, 0)
    assert rows[WALL].merged.ratio == pytest.approx(1.3)
    assert found.providers["CPUExecutionProvider"]["1"]["merged"].median_ms == pytest.approx(1300)


def test_a_release_that_is_slower_by_the_steady_clock_fails_whatever_the_wall_clock_says(clock) -> None:
    steady = readings(Clocks((PROCESSOR,), threads=1), {PROCESSOR: 0.001}, slower=1.03)
    found = timed(lambda: clock.job(1.0), lambda: clock.job(1.0), steady=lambda *_: steady)
    assert (found.verdict, found.ratio) == ("fail", pytest.approx(1.03, abs=0.002))


def test_a_budget_is_kept_by_the_time_that_its_meter_counts() -> None:
    """Other programs make the wall clock run twenty times as fast; as many blocks are measured as without them."""
    processor, rng = Clock(), np.random.default_rng(0)
    meter = Meter(Clocks((PROCESSOR,), threads=1), lambda: (processor.now,), lambda: processor.now)

    def noisy():
        return processor.job(0.005 * float(np.exp(rng.normal(0, 0.3))))

    measure({"base": noisy, "again": noisy, "merged": noisy}, Precision(40, 1e-9), BUDGET, meter=meter)
    assert BUDGET.patience < processor.now < 1.3 * (BUDGET.patience + 3 * BUDGET.seconds)


@pytest.mark.parametrize(("seconds", "long"), [(0.5 * latency.LONG_RUN, False), (2 * latency.LONG_RUN, True)])
def test_only_models_whose_run_is_long_are_timed_at_the_same_time(clock, seconds: float, long: bool) -> None:
    called = []

    def time_long_runs(jobs, rounds, rng):
        called.append(rounds)
        return latency.time_runs(jobs, rounds, rng, lambda: (clock.now,))

    openers = {name: lambda: clock.job(seconds) for name in ("base", "again", "merged")}
    readings = measure(openers, Precision(40, 0.05), BUDGET, time_long_runs=time_long_runs)
    assert bool(called) == long
    assert len(called) == (len(readings.by(WALL)["base"]) if long else 0)


@pytest.mark.parametrize(("timed_together", "rounds"), [(True, 1), (False, BUDGET.fewest_rounds)])
def test_a_very_slow_model_gets_one_round_a_block_at_the_same_time_and_a_few_in_turn(
    clock, timed_together: bool, rounds: int
) -> None:
    def in_turn(jobs, rounds, rng):
        return latency.time_runs(jobs, rounds, rng, lambda: (clock.now,))

    openers = {name: lambda: clock.job(10.0) for name in ("base", "again", "merged")}
    readings = measure(openers, Precision(400, 0.05), BUDGET, time_long_runs=in_turn if timed_together else None)
    assert readings.by(WALL)["base"].shape[1] == rounds
