"""Run the graphs of an untrusted release in a separate process first, with limits of memory and time.

A graph is code: it can allocate too much memory or never end. A failure here is a failed check, and the graphs are then
not run in this process. What they give for the golden samples is kept, so that it is computed once.

    python -m r1export.verify.trial RELEASE BYTES OUTPUTS      runs everything once and prints the error, if any
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from r1export.errors import R1ExportError, first_line
from r1export.update.release_layout import PREPROCESS_GRAPH, TOWERS
from r1export.update.release_manifest import ReleaseManifest
from r1export.verify.golden import (
    GoldenRuns,
    check_classifier,
    golden_parity,
    read_golden,
)
from r1export.verify.runtimes.runtime import open_session, runner
from r1export.verify.static_graphs import check_static_graphs


@dataclass(frozen=True)
class Limits:
    """Limits for the trial of one release: bytes of address space, and seconds."""

    nbytes: int
    seconds: float


def limits_for(release: Path) -> Limits:
    """For weights of W bytes: 16 GB of address space (mostly libraries) plus ten times W; a minute plus one per 250 MB."""
    weights = sum((release / tower.weights).stat().st_size for tower in TOWERS)
    return Limits(nbytes=(16 << 30) + 10 * weights, seconds=60 + weights / 4e6)


class Trial:
    """A trial of a release, running in a child process from now on. A context manager, which ends it."""

    def __init__(self, release: Path, limits: Limits) -> None:
        self._release, self._limits, self._started = release, limits, time.monotonic()
        self._folder = TemporaryDirectory(prefix="r1export-")
        self._outputs = Path(self._folder.name) / "outputs.npz"
        command = [sys.executable, "-m", "r1export.verify.trial", str(release), str(limits.nbytes), str(self._outputs)]
        self._child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, errors="replace"
        )

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_: object) -> None:
        with self._child:
            self._child.kill()
        self._folder.cleanup()

    def result(self, runs: GoldenRuns) -> str:
        """Wait for the end. Returns the error, or an empty string; `runs` then gets the outputs."""
        if problem := self._problem():
            return problem
        try:
            runs.load(self._outputs, self._release)
        except (OSError, ValueError, KeyError) as error:
            return f"the graphs' process left no outputs: {first_line(error)}"
        return ""

    def _problem(self) -> str:
        remaining = self._started + self._limits.seconds - time.monotonic()
        try:
            told, _ = self._child.communicate(
                timeout=max(1.0, remaining)
            )  # one that has ended must be read, however late
        except subprocess.TimeoutExpired:
            return f"the graphs did not finish within {self._limits.seconds:.0f} s"
        if self._child.returncode == 0:
            return ""
        code, gigabytes = self._child.returncode, self._limits.nbytes / 1e9
        crashed = f"the graphs crashed their process (exit code {code}, memory limit {gigabytes:.0f} GB)"
        return next(reversed(told.strip().splitlines()), crashed)


@contextmanager
def trials(releases: Mapping[Path, Limits | None]) -> Iterator[Mapping[Path, Trial]]:
    """Begin the trials of several releases at a time, within limits (None: `limits_for`); leaving the block ends them.

    There is none of a release that lacks a graph or weights: other checks report that.
    """
    with ExitStack() as stack:
        yield {
            release: stack.enter_context(Trial(release, limits or limits_for(release)))
            for release, limits in releases.items()
            if all((release / name).is_file() for tower in TOWERS for name in (tower.graph, tower.weights))
        }


def try_graphs(release: Path, limits: Limits, runs: GoldenRuns) -> str:
    """Run every graph of a release on its golden samples in a child process; `runs` gets their outputs.

    Returns the error, or an empty string.
    """
    with Trial(release, limits) as trial:
        return trial.result(runs)


def run_everything(release: Path) -> GoldenRuns:
    """Run every graph on the golden samples, in the batch sizes of verification; the outputs. Raises R1ExportError."""
    golden, manifest, runs = read_golden(release), ReleaseManifest.read(release), GoldenRuns()
    golden_parity(release, manifest, runs=runs)
    check_classifier(release, [task.name for task in manifest.tasks], {}, runs)
    if (release / PREPROCESS_GRAPH).exists():
        run = runner(open_session(release / PREPROCESS_GRAPH))
        for picture in golden.pictures:
            run({"image": picture})
    list(check_static_graphs(release, manifest))
    return runs


def main(release: Path, nbytes: int, outputs: Path) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes))
    try:
        run_everything(release).save(outputs, release)
    except (R1ExportError, OSError, ValueError, KeyError, MemoryError) as error:
        print(first_line(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
