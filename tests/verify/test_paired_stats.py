"""Statistics on series whose answer is known."""

import numpy as np
import pytest

from r1export.verify.latency import (
    WARM_UP,
    Contenders,
    Precision,
    TimingBudget,
    added_latency,
    measure,
    slowest,
    time_rounds,
    torch_times,
)
from r1export.verify.paired_stats import EARLY, latency_verdict, paired_ratio, student, within_by
from r1export.verify.results import Latency, ProviderLatency, Ratio, Verdict

MARGIN = 0.02


def series(
    ratio: float,
    *,
    seed: int,
    blocks: int = 12,
    rounds: int = 20,
    drift: float = 0.1,
    placement: float = 0.003,
    noise: float = 0.02,
) -> tuple[np.ndarray, np.ndarray]:
    """(merged, base) times: a true ratio under common drift, a shift of each session for its life, and noise with outliers."""
    rng = np.random.default_rng(seed)
    common = 1 + drift * np.sin(np.linspace(0, 9, blocks * rounds)).reshape(blocks, rounds)
    times = []
    for true in (ratio, 1.0):
        shift = np.exp(rng.normal(0, placement, (blocks, 1)))
        jitter = np.exp(rng.normal(0, noise, (blocks, rounds))) * np.where(
            rng.random((blocks, rounds)) < 0.03, 1.5, 1.0
        )
        times.append(0.01 * true * common * shift * jitter)
    return times[0], times[1]


def verdict(ratio: float, seed: int) -> str:
    noise = paired_ratio(*series(1.0, seed=seed + 1000))
    return latency_verdict(paired_ratio(*series(ratio, seed=seed)), noise, MARGIN)[0]


def test_a_true_slow_down_of_five_per_cent_always_fails() -> None:
    assert {verdict(1.05, seed) for seed in range(20)} == {"fail"}


def test_a_true_slow_down_of_three_per_cent_is_never_passed_and_is_found() -> None:
    found = [verdict(1.03, seed) for seed in range(20)]
    assert "pass" not in found
    assert found.count("fail") >= 15


def test_no_slow_down_is_never_a_false_alarm_and_is_passed() -> None:
    found = [verdict(1.0, seed) for seed in range(20)]
    assert "fail" not in found
    assert found.count("pass") >= 18


def test_twice_as_slow_and_twice_as_fast_weigh_the_same() -> None:
    merged, base = series(1.3, seed=3)
    one, other = paired_ratio(merged, base), paired_ratio(base, merged)
    assert one.ratio == pytest.approx(1 / other.ratio)
    assert one.ci95[0] == pytest.approx(1 / other.ci95[1], rel=1e-2)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """95 % of 200, less three standard deviations of a binomial."""
    inside = [
        ratio.ci95[0] <= 1.01 <= ratio.ci95[1]
        for ratio in (paired_ratio(*series(1.01, seed=seed)) for seed in range(200))
    ]
    assert sum(inside) >= 180


def test_blocks_are_drawn_whole() -> None:
    """Rounds of one block share its sessions: a hundred times as many rounds must not make the interval ten times narrower."""
    few, many = (
        paired_ratio(*series(1.0, seed=5, rounds=rounds, placement=0.02, noise=0.001)) for rounds in (10, 1000)
    )
    assert many.halfwidth > 0.5 * few.halfwidth


def test_a_noise_floor_wider_than_the_margin_is_inconclusive_whatever_the_release_did() -> None:
    noise = Ratio(1.0, (0.96, 1.05))
    for merged in (Ratio(1.0, (0.999, 1.001)), Ratio(1.5, (1.4, 1.6))):
        found, advice = latency_verdict(merged, noise, MARGIN)
        assert found == "inconclusive"
        assert "pin threads" in advice


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.99, 1.01, "pass"),
        (0.99, 1.03, "inconclusive"),
        (1.01, 1.03, "inconclusive"),
        (1.021, 1.05, "fail"),
        (0.90, 1.00, "inconclusive"),
        (0.5, 0.6, "inconclusive"),
    ],
)
def test_equivalence_needs_the_whole_interval_inside_the_margin(low: float, high: float, expected: str) -> None:
    assert latency_verdict(Ratio((low + high) / 2, (low, high)), Ratio(1.0, (0.995, 1.005)), MARGIN)[0] == expected


def test_a_release_that_is_faster_than_an_equal_program_can_be_points_to_a_disturbance() -> None:
    found, advice = latency_verdict(Ratio(0.95, (0.94, 0.96)), Ratio(1.0, (0.995, 1.005)), MARGIN)
    assert found == "inconclusive"
    assert "at most 0.960 times" in advice
    assert "wider" not in advice
    assert (
        "is wider than the margin" in latency_verdict(Ratio(0.97, (0.96, 0.99)), Ratio(1.0, (0.995, 1.005)), MARGIN)[1]
    )


def timed(base, release, unmerged=None) -> Latency:
    controls = {"merged": unmerged} if unmerged else {}
    contenders = Contenders("CPUExecutionProvider", base, {"merged": release}, controls)
    return added_latency(contenders, 400, MARGIN, TimingBudget())["merged"]


class Clock:
    """Jobs that take the time they are told, without waiting for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> None:
        self.now, self.rng, self.calls = 0.0, np.random.default_rng(seed), []
        monkeypatch.setattr("r1export.verify.latency.time.perf_counter", lambda: self.now)

    def job(self, seconds: float, spread: float, name: str = ""):
        def run() -> None:
            self.calls.append(name)
            self.now += seconds * float(np.exp(self.rng.normal(0, spread)))

        return run


def test_every_round_runs_the_contenders_in_an_order_and_its_reverse(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    time_rounds({name: clock.job(1.0, 0.0, name) for name in "abc"}, 5, np.random.default_rng(0))
    counted = clock.calls[3 * WARM_UP :]
    rounds = [counted[6 * i : 6 * i + 6] for i in range(5)]
    assert all(one[:3] == one[:2:-1] and set(one) == set("abc") for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1


@pytest.mark.parametrize("ratio", [1.0, 1.05, 1.5])
def test_without_a_margin_when_to_stop_depends_on_the_width_of_the_interval_and_not_on_where_it_lies(
    monkeypatch: pytest.MonkeyPatch, ratio: float
) -> None:
    """The same noise with another true ratio takes the same number of blocks."""

    def blocks(true: float) -> int:
        clock = Clock(monkeypatch, seed=4)
        times = {"base": 1e-3, "again": 1e-3, "merged": true * 1e-3}
        return len(
            measure(
                {name: (lambda seconds=seconds: clock.job(seconds, 0.05)) for name, seconds in times.items()},
                Precision(40, 0.012),
                TimingBudget(),
            ).counts["base"]
        )

    assert blocks(ratio) == blocks(1.0) > 10


def stopped_at(true: float, seed: int, spread: float = 0.012) -> tuple[int, bool]:
    """(blocks, passed) of one release whose sessions differ by `spread`, looked at as `measure` does: from 5 blocks to 40."""
    rng = np.random.default_rng(seed)
    base, merged = (scale * np.exp(rng.normal(0, spread / 2**0.5, (40, 1))) for scale in (1.0, true))
    looked_at = 5
    while looked_at < 40 and not within_by(EARLY, merged[:looked_at], base[:looked_at], MARGIN):
        looked_at += max(1, looked_at // 5)
    found = paired_ratio(merged[: min(looked_at, 40)], base[: min(looked_at, 40)])
    return looked_at, found.within(MARGIN)


def test_an_equal_release_is_known_early_in_most_cases() -> None:
    found = [stopped_at(1.0, seed) for seed in range(200)]
    assert all(passed for _, passed in found)
    assert sum(blocks <= 12 for blocks, _ in found) > 150


def test_looking_early_and_often_passes_no_slower_release() -> None:
    """3 % slower: never. At the margin itself, 2.5 % of the time: as often as one look at the end would."""
    assert not any(stopped_at(1.03, seed)[1] for seed in range(300))
    assert sum(stopped_at(1.0 + MARGIN, seed)[1] for seed in range(1000)) <= 40


def test_one_block_is_never_clear() -> None:
    assert not within_by(EARLY, np.ones((1, 5)), np.ones((1, 5)), MARGIN)


@pytest.mark.parametrize(
    ("z", "freedom", "expected"),
    [(1.96, 4, 2.776), (1.96, 9, 2.262), (3.0, 4, 6.620), (3.0, 9, 4.094), (3.0, 1000, 3.008)],
)
def test_quantiles_of_few_blocks_are_those_of_students_t(z: float, freedom: int, expected: float) -> None:
    assert student(z, freedom) == pytest.approx(expected, rel=0.01)


def test_the_interval_of_five_blocks_holds_the_truth_as_often_as_that_of_many() -> None:
    rng = np.random.default_rng(0)
    inside = [
        found.ci95[0] <= 1.0 <= found.ci95[1]
        for found in (paired_ratio(np.exp(rng.normal(0, 0.01, (5, 1))), np.ones((5, 1))) for _ in range(400))
    ]
    assert sum(inside) >= 365


def test_a_release_with_a_true_slow_down_fails_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    found = timed(
        lambda: clock.job(1e-3, 0.01),
        lambda: clock.job(1.04e-3, 0.01),
        unmerged=lambda: clock.job(1.3e-3, 0.01),
    )
    assert found.verdict == "fail"
    assert found.ratio == pytest.approx(1.04, abs=0.01)
    assert found.unmerged_ratio == pytest.approx(1.3, abs=0.02)


def test_quantiles_are_given_only_with_the_runs_that_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    found = timed(
        lambda: clock.job(1e-3, 0.01),
        lambda: clock.job(1e-3, 0.01),
    )
    table = found.providers["CPUExecutionProvider"]["1"]
    assert table["base"].p90_ms is not None
    assert table["base"].p99_ms is None
    assert torch_times({"merged_torch": clock.job(2e-3, 0.01)})["merged_torch"].p90_ms is None


def test_quantiles_are_those_of_single_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fourth run takes twice as long, never two of one round: the mean of a round would hide it."""
    clock = Clock(monkeypatch)
    runs = iter(range(10**6))

    def run() -> None:
        clock.now += 2e-3 if next(runs) % 4 == 0 else 1e-3

    found = timed(lambda: run, lambda: clock.job(1e-3, 0.0))
    table = found.providers["CPUExecutionProvider"]["1"]
    assert table["base"].p90_ms == pytest.approx(2.0)
    assert table["base"].n == found.pairs


def on_provider(name: str, verdict: Verdict, ratio: float) -> Latency:
    around, noise = (ratio - 0.001, ratio + 0.001), Ratio(1.0, (0.999, 1.001))
    one = ProviderLatency(verdict=verdict, ratio=ratio, ci95=around, noise_floor=noise)
    figures = {"ratio": ratio, "ci95": around, "margin": MARGIN, "noise_floor": noise}
    return Latency(verdict=verdict, looked_at=1, of=1, providers={name: {}}, by_provider={name: one}, **figures)


def test_the_worst_provider_gives_the_verdict_and_all_tables_are_kept() -> None:
    worst = slowest([on_provider("A", Verdict.PASS, 1.01), on_provider("B", Verdict.FAIL, 1.2)], "visual")
    assert (worst.verdict, worst.ratio, worst.tower, worst.looked_at, worst.of) == ("fail", 1.2, "visual", 2, 2)
    assert set(worst.providers) == {"A", "B"}
    assert {name: (one.verdict, one.ratio) for name, one in worst.by_provider.items()} == {
        "A": ("pass", 1.01),
        "B": ("fail", 1.2),
    }


def test_no_provider_that_can_be_timed_is_no_pass() -> None:
    assert slowest([], "visual").verdict == "not_applicable"


def sessions(seed: int, *, share: float, slower: float, blocks: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Equal programs, of which the first has `share` of its sessions slower for their life."""
    merged, base = series(1.0, seed=seed, blocks=blocks)
    slow = np.random.default_rng(seed).permutation(blocks) < round(share * blocks)
    return np.where(slow[:, None], slower, 1.0) * merged, base


def test_a_session_that_the_machine_slows_for_its_life_does_not_keep_equal_programs_from_passing() -> None:
    """One block of twenty, a third slower: its weight in a plain mean, 1.4 %, would widen the interval beyond the margin for good."""
    found = [paired_ratio(*sessions(seed, share=0.05, slower=1.33)) for seed in range(20)]
    assert sum(one.within(MARGIN) for one in found) >= 19


def test_a_release_that_is_slow_every_third_time_is_not_passed() -> None:
    noise = Ratio(1.0, (0.995, 1.005))
    found = [
        latency_verdict(paired_ratio(*sessions(seed, share=1 / 3, slower=1.1)), noise, MARGIN)[0] for seed in range(20)
    ]
    assert "pass" not in found


def test_one_block_tells_nothing_of_the_spread() -> None:
    merged, base = series(1.0, seed=0, blocks=1)
    assert not paired_ratio(merged, base).within(10.0)
    assert not within_by(1.0, merged, base, 10.0)
