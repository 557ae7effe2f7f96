"""Time jobs that run at the same time on one core, so that whatever disturbs it disturbs all of them alike.

Each job has a thread of its own, and all threads are bound to one core. The scheduler of the operating system lets them
compute in turn for a few milliseconds each, and the clocks of a thread stand still in between. Run one after the other, jobs
are disturbed differently: blocks of ViT-B/16 against itself then spread ten times as much (docs/experiments/latency.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from threading import Barrier, BrokenBarrierError

import numpy as np

from r1export.verify.clocks import Meter

OpenMeter = Callable[[], AbstractContextManager[Meter]]


def can_bind() -> bool:
    """Whether threads can be bound to a core: on Linux, unless a sandbox forbids it."""
    try:
        os.sched_setaffinity(0, os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return False
    return True


def time_together(
    jobs: Mapping[str, Callable[[], object]], runs: int, rng: np.random.Generator, open_meter: OpenMeter
) -> dict[str, np.ndarray]:
    """Readings (runs, clocks) of each job by a meter of its thread; on a core, and with an order of threads, drawn by `rng`."""
    everyone_is_here = Barrier(len(jobs))

    def count(job: Callable[[], object]) -> np.ndarray:
        with _or_abort(everyone_is_here, open_meter) as meter:
            readings = np.zeros((runs, len(meter.clocks.names)))
            everyone_is_here.wait()
            for i in range(runs):
                before = meter.read()
                job()
                readings[i] = np.subtract(meter.read(), before)
        return readings

    with _one_core(rng), ThreadPoolExecutor(len(jobs)) as threads:
        started = {str(name): threads.submit(count, jobs[str(name)]) for name in rng.permutation(list(jobs))}
    failures = [error for error in (thread.exception() for thread in started.values()) if error]
    if failures:  # a broken barrier only says that another thread failed
        raise next((error for error in failures if not isinstance(error, BrokenBarrierError)), failures[0])
    return {name: started[name].result() for name in jobs}


@contextmanager
def _or_abort(barrier: Barrier, open_meter: OpenMeter) -> Iterator[Meter]:
    """An opened meter; if it can't be opened, no other thread is left waiting at the barrier."""
    with ExitStack() as stack:
        try:
            meter = stack.enter_context(open_meter())
        except BaseException:
            barrier.abort()
            raise
        yield meter


@contextmanager
def _one_core(rng: np.random.Generator) -> Iterator[None]:
    """Bind this thread, and the threads that it starts, to one core of those that it may use."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {int(rng.choice(sorted(allowed)))})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
