"""Time the image towers of all contenders in one process, interleaved, as `r1export verify` times base and release.

    python -m peers.timing WORK --only r1export peft --blocks 16 --rounds 5

Every block opens fresh sessions of all graphs; every round runs each of them twice in random order and in reverse. r1export's
base stands twice, against itself: that is the noise floor.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from peers.row import Graph, Timing, Timings
from peers.workload import read_samples
from r1export.verify.latency import Job, Opener, time_rounds
from r1export.verify.paired_stats import latency_verdict, paired_ratio
from r1export.verify.runtimes.runtime import open_session

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
MARGIN = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="+", required=True, help="the contenders whose rows are from this comparison")
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    asked = parser.parse_args()
    seconds = measure(openers(asked.work, asked.only, asked.threads), asked.blocks, asked.rounds, CLOCKS[asked.clock])
    (asked.work / "timing.json").write_text(json.dumps(summary(seconds), indent=2) + "\n", encoding="utf-8")


def openers(work: Path, names: list[str], threads: int) -> dict[str, Opener]:
    """ "NAME base", "NAME adapted" and so on -> opens a fresh session and gives the job of embedding one image."""
    feeds = {"pixel_values": read_samples(work)["pixel_values"][:1]}
    found: dict[str, Opener] = {}
    for name in names:
        graphs: dict[str, Graph] = json.loads((work / "rows" / f"{name}.json").read_text(encoding="utf-8"))["graphs"]
        for kind, entry in graphs.items():
            found[f"{name} {kind}"] = partial(_job, entry, feeds, threads)
    if "r1export base" in found:
        found["r1export again"] = found["r1export base"]
    return found


def _job(entry: Graph, feeds: dict[str, np.ndarray], threads: int) -> Job:
    session: Any = open_session(Path(entry["graph"]), threads=threads)
    if "adapter" not in entry:
        return lambda: session.run(None, feeds)
    adapter, options = ort.LoraAdapter(), ort.RunOptions()
    adapter.Load(entry["adapter"])
    options.add_active_adapter(adapter)

    def job(adapter: ort.LoraAdapter = adapter) -> object:  # it has to live as long as the options that refer to it
        return session.run(None, feeds, options)

    return job


def measure(openers: dict[str, Opener], blocks: int, rounds: int, clock: Callable[[], float]) -> dict[str, np.ndarray]:
    """Seconds (blocks, rounds) of every job."""
    rng, found = np.random.default_rng(0), []
    for _ in range(blocks):
        jobs = {str(name): openers[str(name)]() for name in rng.permutation(list(openers))}
        found.append(time_rounds(jobs, rounds, rng, clock))
    return {name: np.stack([block[name] for block in found]) for name in openers}


def summary(seconds: dict[str, np.ndarray]) -> Timings:
    """By contender: median milliseconds of each graph, and ratios to its own base with 95 % intervals and a verdict."""
    found: dict[str, Timing] = {}
    again = seconds.get("r1export again")
    noise = None if again is None else paired_ratio(again, seconds["r1export base"])
    for name in sorted({key.split()[0] for key in seconds}):
        kinds = [key.split()[1] for key in seconds if key.split()[0] == name]
        found[name] = {"ms": {kind: 1000 * float(np.median(seconds[f"{name} {kind}"])) for kind in kinds}, "ratios": {}}
        for kind in kinds:
            if kind != "base":
                one = paired_ratio(seconds[f"{name} {kind}"], seconds[f"{name} base"])
                verdict = latency_verdict(one, noise, MARGIN)[0] if noise else "inconclusive"
                found[name]["ratios"][kind] = {"ratio": one.ratio, "ci95": [*one.ci95], "verdict": verdict}
    return {"contenders": found, "rounds": int(next(iter(seconds.values())).size), "load": os.getloadavg()[0]}


if __name__ == "__main__":
    main()
