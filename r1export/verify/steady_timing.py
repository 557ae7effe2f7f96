"""Time graphs on the CPU provider by processor time, in a separate process with one thread per session.

A separate process, because the memory placement of weights makes a session faster or slower for its whole life: with pages
of 4 kB, base vs. base differed by 3 %; with pages of 2 MB, which the C library uses only if configured at process start,
by 1.3 % (docs/experiments/latency.md).

    python -m r1export.verify.steady_timing FOLDER     times the graphs in FOLDER/request.json, one line on stdout per block
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from r1export.errors import CheckFailed, R1ExportError, first_line
from r1export.verify.clocks import Clocks, thread_clocks
from r1export.verify.latency import AGAIN, BASE, Measure, Opener, Precision, Readings, TimingBudget, measure
from r1export.verify.runtimes.runtime import job, open_session

LARGE_PAGES = "glibc.malloc.hugetlb=1"  # madvise(MADV_HUGEPAGE) on what malloc maps; other C libraries ignore it
REQUEST, FEEDS, READINGS = "request.json", "feeds.npz", "readings.npz"


@dataclass(frozen=True)
class _Request:
    """`graphs` are paths by contender; `controls` are those that are timed in the first blocks only; `nbytes` may be used."""

    graphs: dict[str, str]
    controls: list[str]
    wanted: dict[str, float]
    budget: dict[str, float]
    nbytes: int


class SteadyTiming:
    """Times graphs on the CPU provider in a child process, from now on. A context manager, which ends it.

    One of `graphs` is "base"; "again" is the base a second time. `controls` are those that are timed in the first blocks only.
    The child may use `nbytes` of address space; 0: as much as it likes. With `own_core` it runs on one core, and this thread and
    what it starts on the others until the readings are there, so that other work goes on at the same time.
    """

    def __init__(
        self,
        graphs: Mapping[str, Path],
        feeds: Mapping[str, np.ndarray],
        wanted: Precision,
        budget: TimingBudget,
        controls: Collection[str] = (),
        nbytes: int = 0,
        own_core: bool = False,
    ) -> None:
        by_name = {name: str(path.resolve()) for name, path in ({AGAIN: graphs[BASE]} | dict(graphs)).items()}
        self._names = list(by_name)
        self._temporary = TemporaryDirectory(prefix="r1export-")
        self._folder = Path(self._temporary.name)
        request = _Request(by_name, sorted(controls), asdict(wanted), asdict(budget), nbytes)
        (self._folder / REQUEST).write_text(json.dumps(asdict(request)), encoding="utf-8")
        np.savez(self._folder / FEEDS, **feeds)  # type: ignore[arg-type]  # its stubs take allow_pickle for a feed
        tunables = ":".join(filter(None, (os.environ.get("GLIBC_TUNABLES"), LARGE_PAGES)))
        command = [sys.executable, "-m", "r1export.verify.steady_timing", str(self._folder)]
        environment = os.environ | {"GLIBC_TUNABLES": tunables}
        self._child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self._cores = _give_a_core_to(self._child) if own_core else None

    def __enter__(self) -> SteadyTiming:
        return self

    def __exit__(self, *_: object) -> None:
        with self._child:
            self._child.kill()
        self._temporary.cleanup()
        self._take_back_the_core()

    def _take_back_the_core(self) -> None:
        if self._cores:
            os.sched_setaffinity(0, self._cores)
            self._cores = None

    def readings(self, on_block: Callable[[], None]) -> Readings:
        """Wait for the end. Raises CheckFailed with the child's last line if it fails."""
        assert self._child.stdout is not None  # it is a pipe
        last = ""
        for line in self._child.stdout:
            last = line.strip()
            if last == "block":
                on_block()
        code = self._child.wait()
        self._take_back_the_core()
        if code:
            reason = last or f"exit code {code}"
            raise CheckFailed(f"timing the graphs failed: {reason}", "export the release again")
        return _read(self._folder, self._names)


def _give_a_core_to(child: subprocess.Popen[str]) -> set[int]:
    """Separate the cores of `child` from those of this thread, which had those that are returned: two or more."""
    cores = os.sched_getaffinity(0)
    last = max(cores)
    os.sched_setaffinity(child.pid, {last})
    os.sched_setaffinity(0, cores - {last})
    return cores


def steady_timing(
    graphs: Mapping[str, Path], feeds: Mapping[str, np.ndarray], controls: Collection[str] = ()
) -> Measure:
    """A meter for `graphs` on the CPU provider, as `SteadyTiming` takes them. It raises CheckFailed if timing fails."""

    def time_them(wanted: Precision, budget: TimingBudget, on_block: Callable[[], None]) -> Readings:
        with SteadyTiming(graphs, feeds, wanted, budget, controls) as timing:
            return timing.readings(on_block)

    return time_them


def _read(folder: Path, names: list[str]) -> Readings:
    with np.load(folder / READINGS) as arrays:
        counts = {name: arrays[f"counts.{name}"] for name in names}
        clocks, threads, uncounted = (arrays[name] for name in ("clocks", "threads", "uncounted"))
    return Readings(Clocks(tuple(clocks.tolist()), int(threads), str(uncounted)), counts)


def _time(folder: Path) -> None:
    request = _Request(**json.loads((folder / REQUEST).read_text(encoding="utf-8")))
    if request.nbytes:
        resource.setrlimit(resource.RLIMIT_AS, (request.nbytes, request.nbytes))
    with np.load(folder / FEEDS) as arrays:
        feeds = dict(arrays)

    def opener(graph: str) -> Opener:
        return lambda: job(open_session(Path(graph), threads=1), feeds, "cpu")

    with thread_clocks() as meter:
        readings = measure(
            {name: opener(graph) for name, graph in request.graphs.items()},
            Precision(**request.wanted),  # type: ignore[arg-type]
            TimingBudget(**request.budget),  # type: ignore[arg-type]
            lambda: print("block", flush=True),
            meter,
            request.controls,
        )
    clocks = readings.clocks
    facts = {"clocks": clocks.names, "threads": clocks.threads, "uncounted": clocks.uncounted}
    arrays = {name: np.asarray(value) for name, value in facts.items()}
    arrays |= {f"counts.{name}": values for name, values in readings.counts.items()}
    np.savez(folder / READINGS, **arrays)


def main(folder: Path) -> int:
    try:
        _time(folder)
    except (R1ExportError, OSError, ValueError, MemoryError) as error:
        print(first_line(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
