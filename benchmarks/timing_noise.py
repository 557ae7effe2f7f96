"""How much does a graph's time differ from itself, timed in turn and at the same time on one core?

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/timing_noise.py RUN/releases/01-trash6 --loops 2 --json noise.json

A tower of the release and of its base (../00-base, twice) is timed as rung L5 does, by processor time of one thread,
with fresh sessions in every block, next to `--loops` busy loops. Blocks of both ways alternate, with the same number of runs.
The table has the standard deviation of the blocks' log-ratios, and a 95 % interval of it (bootstrap).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from latency import busy_loops

from r1export.verify.clocks import thread_clocks
from r1export.verify.golden import read_golden
from r1export.verify.latency import AGAIN, BASE, Opener, pairs_of, seconds_a_run, time_runs, together
from r1export.verify.parity import ENTRIES, TOWERS, Inputs
from r1export.verify.runtimes.runtime import job, open_session

WAYS = ("in turn", "at the same time")
MERGED = "merged"
ROUNDS, SECONDS = 20, 0.3  # of a model in a block, at most, as L5 has them: rounds of two runs, seconds
RESAMPLES = 2000


@dataclass(frozen=True)
class Noise:
    """The standard deviation of log-ratios between blocks, its 95 % interval, and the ratio that they estimate."""

    way: str
    contender: str
    deviation: float
    ci95: tuple[float, float]
    ratio: float
    blocks: int


def main() -> None:
    asked = _arguments()
    base, release = asked.release.parent / "00-base", asked.release
    golden, tower = read_golden(release), asked.tower
    feeds = {ENTRIES[tower]: Inputs(golden.pixel_values, golden.input_ids).tower(tower)[:1]}

    def opener(folder: Path) -> Opener:
        return lambda: job(open_session(folder / f"{tower}.onnx", threads=1), feeds, "cpu")

    openers = {BASE: opener(base), AGAIN: opener(base), MERGED: opener(release)}
    ratios: dict[tuple[str, str], list[float]] = {(way, name): [] for way in WAYS for name in (AGAIN, MERGED)}
    rng = np.random.default_rng(0)
    with busy_loops(asked.loops):
        for _ in range(asked.blocks):
            for way in WAYS:
                for name, value in _block(openers, way, rng).items():
                    ratios[way, name].append(value)
    found = [_noise(way, name, np.array(values)) for (way, name), values in ratios.items()]
    print(table(found))
    if asked.json:
        settings = {
            "release": release.name,
            "tower": tower,
            "blocks": asked.blocks,
            "loops": asked.loops,
            "load": os.getloadavg()[0],
        }
        document = {"settings": settings, "machine": platform.machine(), "noise": [asdict(one) for one in found]}
        asked.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", type=Path, help="a release folder next to its base")
    parser.add_argument("--tower", choices=TOWERS, default="visual")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--loops", type=int, default=0, help="busy loops that run all the time")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _block(openers: Mapping[str, Opener], way: str, rng: np.random.Generator) -> dict[str, float]:
    """One block: the log-ratio of the base to itself, and of the release to the base."""
    jobs = {str(name): openers[str(name)]() for name in rng.permutation(list(openers))}
    with thread_clocks() as meter:
        rounds = max(1, min(ROUNDS, int(SECONDS / (2 * seconds_a_run(jobs, meter)))))
        time_block = together(thread_clocks) if way == WAYS[1] else partial(time_runs, clock=meter.read)
        counts = {name: readings[None, ..., 0] for name, readings in time_block(jobs, rounds, rng).items()}
    pairs = {name: pairs_of(counts, name) for name in (AGAIN, MERGED)}
    return {name: float(np.median(np.log(own) - np.log(base))) for name, (own, base) in pairs.items()}


def _noise(way: str, name: str, values: np.ndarray) -> Noise:
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].std(1, ddof=1), [0.025, 0.975])
    deviation, ratio = float(values.std(ddof=1)), float(np.exp(values.mean()))
    return Noise(way, name, deviation, (float(low), float(high)), ratio, len(values))


def table(found: list[Noise]) -> str:
    """Markdown."""
    lines = [
        f"| {one.way} | {one.contender} | {100 * one.deviation:.2f} % | {100 * one.ci95[0]:.2f} to {100 * one.ci95[1]:.2f} % | {one.ratio:.4f} |"
        for one in found
    ]
    return "\n".join(
        ["| timed | against the base | deviation between blocks | 95 % | ratio |", "|---|---|---|---|---|", *lines]
    )


if __name__ == "__main__":
    main()
