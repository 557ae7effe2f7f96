"""Jobs that are timed while they run at the same time on one core."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from r1export.verify.clocks import PROCESSOR, Clocks, Meter, thread_clocks
from r1export.verify.concurrent_runs import can_bind, time_together
from r1export.verify.latency import together

pytestmark = pytest.mark.skipif(not can_bind(), reason="threads cannot be bound to a core here")
PATIENCE = 30  # seconds that a job waits for the others: for ever, if they do not run at the same time


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


class ThreadCounter:
    """A clock for each thread, which only that thread's jobs move."""

    def __init__(self) -> None:
        self.counts: dict[int, float] = {}

    @contextmanager
    def meter(self) -> Iterator[Meter]:
        yield Meter(Clocks((PROCESSOR,), 1), lambda: (self.counts.get(threading.get_ident(), 0.0),), lambda: 0.0)

    def job(self, seconds: float):
        def run() -> None:
            thread = threading.get_ident()
            self.counts[thread] = self.counts.get(thread, 0.0) + seconds

        return run


def test_each_job_is_read_by_the_clock_of_its_own_thread(rng) -> None:
    counter = ThreadCounter()
    found = time_together({"base": counter.job(1.0), "merged": counter.job(3.0)}, 4, rng, counter.meter)
    assert {name: values.tolist() for name, values in found.items()} == {"base": [[1.0]] * 4, "merged": [[3.0]] * 4}


def test_jobs_run_at_the_same_time(rng) -> None:
    meeting = threading.Barrier(3)
    found = time_together({name: lambda: meeting.wait(PATIENCE) for name in "abc"}, 2, rng, thread_clocks)
    assert all(values.shape[0] == 2 for values in found.values())


def test_jobs_share_one_core_which_is_drawn_anew_and_given_free_afterwards(rng) -> None:
    allowed, seen = os.sched_getaffinity(0), []
    for _ in range(20):
        time_together(
            {name: lambda: seen.append(frozenset(os.sched_getaffinity(0))) for name in "abc"}, 1, rng, thread_clocks
        )
    assert all(len(cores) == 1 for cores in seen)
    assert all(len(set(seen[i : i + 3])) == 1 for i in range(0, 60, 3)), "all jobs on the same core"
    assert set().union(*seen) == allowed or len(allowed) > 4, "each core gets its turn"
    assert os.sched_getaffinity(0) == allowed


@pytest.mark.parametrize("system", ["macOS", "sandbox"])
def test_threads_cannot_be_bound_where_the_system_has_no_call_for_it_or_refuses_it(system: str, monkeypatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    assert can_bind()
    if system == "macOS":
        monkeypatch.delattr(os, "sched_setaffinity")
    else:
        monkeypatch.setattr(os, "sched_setaffinity", refused)
    assert not can_bind()


def test_a_job_that_fails_is_reported_and_keeps_no_other_waiting(rng) -> None:
    def fail() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        time_together({"base": lambda: None, "merged": fail}, 3, rng, thread_clocks)


def test_a_clock_that_cannot_be_opened_keeps_no_thread_waiting(rng) -> None:
    opened = []

    @contextmanager
    def meter() -> Iterator[Meter]:
        opened.append(1)
        if len(opened) == 2:
            raise OSError("no counters left")
        with thread_clocks() as clocks:
            yield clocks

    with pytest.raises(OSError, match="no counters left"):
        time_together({"base": lambda: None, "merged": lambda: None}, 1, rng, meter)


def test_a_block_has_rounds_of_two_runs_after_a_warm_up(rng) -> None:
    counter, runs = ThreadCounter(), []
    count = counter.job(1.0)
    found = together(counter.meter)({"base": lambda: (runs.append(1), count())}, 3, rng)
    assert found["base"].shape == (3, 2, 1)
    assert len(runs) == 7
