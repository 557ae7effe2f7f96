"""What `verify RELEASE` computes in other processes from the start, while it reads files: trials, and rung L5 on the CPU.

Nothing of it is used before the files have passed: a release that fails ends these processes. The graphs run within the
limits of a trial in all of them. Rung L5 has a core of its own: next to other work on the same cores its intervals are wider.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from r1export.recipe import Verify
from r1export.update.release_layout import GRAPHS
from r1export.update.release_manifest import ReleaseManifest
from r1export.verify import parity
from r1export.verify.contents import UNREADABLE
from r1export.verify.golden import read_golden
from r1export.verify.latency import BASE, TimingBudget, precision_for
from r1export.verify.parity import ENTRIES
from r1export.verify.runtimes.runtime import CORES
from r1export.verify.steady_timing import SteadyTiming
from r1export.verify.trial import Limits, Trial, limits_for

CAN_SHARE = hasattr(os, "sched_setaffinity") and CORES > 1  # timing needs a core of its own to go on beside other work


@dataclass(frozen=True)
class HeadStart:
    """The processes of a release and of the base next to it; None for what could not be started."""

    trial: Trial | None = None
    base_trial: Trial | None = None
    timing: SteadyTiming | None = None


@contextmanager
def head_start(
    release: Path, base: Path | None, limits: Limits | None, budget: TimingBudget | None
) -> Iterator[HeadStart]:
    """Start the trials, within `limits` for the release (default: `limits_for`), and rung L5 if there are a base and a `budget`."""
    with ExitStack() as stack:
        if not _complete(release):
            yield HeadStart()
            return
        limits, neighbour = limits or limits_for(release), base if base and _complete(base) else None
        timing = _timing(release, neighbour, limits, budget) if neighbour and budget and CAN_SHARE else None
        if timing:  # first, as the trials share the cores that it leaves
            stack.enter_context(timing)
        trial = stack.enter_context(Trial(release, limits))
        base_trial = stack.enter_context(Trial(neighbour, limits_for(neighbour))) if neighbour else None
        yield HeadStart(trial, base_trial, timing)


def _complete(folder: Path) -> bool:
    """Whether there is something to run."""
    weights = (f"{tower}.safetensors" for tower in parity.TOWERS)
    return all((folder / name).is_file() for name in (*GRAPHS, *weights))


def _timing(release: Path, base: Path, limits: Limits, budget: TimingBudget) -> SteadyTiming | None:
    """Rung L5 by the defaults of a recipe; None if the files that it needs cannot be read, of which the checks tell more."""
    with suppress(*UNREADABLE):
        tower = timed_tower(ReleaseManifest.read(release), ReleaseManifest.read(base))
        golden, settings = read_golden(release), Verify()
        feeds = {ENTRIES[tower]: parity.Inputs(golden.pixel_values, golden.input_ids).tower(tower)[:1]}
        graphs = {BASE: base / f"{tower}.onnx", release.name: release / f"{tower}.onnx"}
        wanted = precision_for(settings.pairs, settings.margin, budget)
        return SteadyTiming(graphs, feeds, wanted, budget, nbytes=limits.nbytes, own_core=True)
    return None


def timed_tower(release: ReleaseManifest, base: ReleaseManifest) -> str:
    """The tower that rung L5 times: the visual one, unless only the weights of the textual one differ from the base's."""
    weights = {tower: f"{tower}.safetensors" for tower in parity.TOWERS}
    changed = (tower for tower, name in weights.items() if release.files.get(name) != base.files.get(name))
    return next(changed, "visual")
