"""Run the graphs of an untrusted release in a separate process first, with limits of memory and time.

A graph is code: it can allocate too much memory or never end. A failure here is a failed check, and the graphs are then
not run in this process. What they give for the golden samples is kept, so that it is computed once.

    python -m r1export.verify.trial RELEASE BYTES OUTPUTS      runs everything once and prints the error, if any
"""

from __future__ import annotations

import resource
import subprocess
import sys
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
    load_outputs,
    read_golden,
    save_outputs,
)
from r1export.verify.parity import Outputs
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


def try_graphs(release: Path, limits: Limits, runs: GoldenRuns) -> str:
    """Run every graph of a release on its golden samples in a child process; `runs` gets the outputs of its towers.

    Returns the error, or an empty string.
    """
    with TemporaryDirectory(prefix="r1export-") as folder:
        outputs = Path(folder) / "outputs.npz"
        if problem := _run_child(release, limits, outputs):
            return problem
        try:
            runs.add(release, "cpu", load_outputs(outputs, "cpu"))
        except (OSError, ValueError, KeyError) as error:
            return f"the graphs' process left no outputs: {first_line(error)}"
    return ""


def _run_child(release: Path, limits: Limits, outputs: Path) -> str:
    command = [sys.executable, "-m", "r1export.verify.trial", str(release), str(limits.nbytes), str(outputs)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=limits.seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return f"the graphs did not finish within {limits.seconds:.0f} s"
    if done.returncode == 0:
        return ""
    lines = done.stdout.strip().splitlines()
    gigabytes = limits.nbytes / 1e9
    return (
        lines[-1]
        if lines
        else f"the graphs crashed their process (exit code {done.returncode}, memory limit {gigabytes:.0f} GB)"
    )


def run_everything(release: Path) -> Outputs:
    """Run every graph on the golden samples, in the batch sizes of verification; the towers' outputs. Raises R1ExportError."""
    golden, manifest, runs = read_golden(release), ReleaseManifest.read(release), GoldenRuns()
    golden_parity(release, manifest, runs=runs)
    check_classifier(release, [task.name for task in manifest.tasks], {})
    if (release / PREPROCESS_GRAPH).exists():
        run = runner(open_session(release / PREPROCESS_GRAPH))
        for picture in golden.pictures:
            run({"image": picture})
    list(check_static_graphs(release, manifest))
    return runs.of(release, "cpu")


def main(release: Path, nbytes: int, outputs: Path) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes))
    try:
        save_outputs(outputs, run_everything(release))
    except (R1ExportError, OSError, ValueError, KeyError, MemoryError) as error:
        print(first_line(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
