"""Time graphs on the CPU provider by processor time, in a separate process: all at once on one core, a thread per session.

A separate process, because the memory placement of weights makes a session faster or slower for its whole life: with pages
of 4 kB, base vs. base differed by 3 %; with pages of 2 MB, which the C library uses only if configured at process start,
by 1.3 % (docs/experiments/latency.md).

    python -m r1export.verify.steady_timing FOLDER     times the graphs in FOLDER/request.json, one line on stdout per block
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from r1export.errors import CheckFailed, R1ExportError, first_line
from r1export.verify.clocks import Clocks, thread_clocks
from r1export.verify.concurrent_runs import can_bind
from r1export.verify.latency import AGAIN, BASE, Measure, Opener, Precision, Readings, TimingBudget, measure, together
from r1export.verify.runtimes.runtime import job, open_session

LARGE_PAGES = "glibc.malloc.hugetlb=1"  # madvise(MADV_HUGEPAGE) on what malloc maps; other C libraries ignore it
REQUEST, FEEDS, READINGS = "request.json", "feeds.npz", "readings.npz"


@dataclass(frozen=True)
class _Request:
    """`graphs` are paths by contender; `controls` are those that are timed in the first blocks only."""

    graphs: dict[str, str]
    controls: list[str]
    wanted: dict[str, float]
    budget: dict[str, float]


def steady_timing(
    graphs: Mapping[str, Path], feeds: Mapping[str, np.ndarray], controls: Collection[str] = ()
) -> Measure:
    """A meter for `graphs`, one of which is "base", on the CPU provider; "again" is the base a second time.

    `controls` are those of the graphs that are timed in the first blocks only.

    The meter raises CheckFailed if timing fails.
    """
    by_name = {name: str(path.resolve()) for name, path in ({AGAIN: graphs[BASE]} | dict(graphs)).items()}

    def time_them(wanted: Precision, budget: TimingBudget, on_block: Callable[[], None]) -> Readings:
        with TemporaryDirectory(prefix="r1export-") as folder:
            request = _Request(by_name, sorted(controls), asdict(wanted), asdict(budget))
            (Path(folder) / REQUEST).write_text(json.dumps(asdict(request)), encoding="utf-8")
            np.savez(Path(folder) / FEEDS, **feeds)  # type: ignore[arg-type]  # its stubs take allow_pickle for a feed
            _run(Path(folder), on_block)
            return _read(Path(folder), list(by_name))

    return time_them


def _run(folder: Path, on_block: Callable[[], None]) -> None:
    """The child process. Raises CheckFailed with its last line if it fails."""
    tunables = ":".join(filter(None, (os.environ.get("GLIBC_TUNABLES"), LARGE_PAGES)))
    command = [sys.executable, "-m", "r1export.verify.steady_timing", str(folder)]
    last = ""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"GLIBC_TUNABLES": tunables}
    ) as child:
        assert child.stdout is not None  # it is a pipe
        try:
            for line in child.stdout:
                last = line.strip()
                if last == "block":
                    on_block()
        except BaseException:  # also on an interruption, which would otherwise wait for the child
            child.kill()
            raise
    if child.returncode:
        raise CheckFailed(
            f"timing the graphs failed: {last or f'exit code {child.returncode}'}", "export the release again"
        )


def _read(folder: Path, names: list[str]) -> Readings:
    with np.load(folder / READINGS) as arrays:
        counts = {name: arrays[f"counts.{name}"] for name in names}
        clocks, threads, uncounted = (arrays[name] for name in ("clocks", "threads", "uncounted"))
    return Readings(Clocks(tuple(clocks.tolist()), int(threads), str(uncounted)), counts)


def _time(folder: Path) -> None:
    request = _Request(**json.loads((folder / REQUEST).read_text(encoding="utf-8")))
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
            together(thread_clocks) if can_bind() else None,
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
