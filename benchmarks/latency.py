"""How reliable is rung L5 on a busy machine? Verifies a run repeatedly next to busy loops, and times a slowed release.

    r1export run recipes/quickstart.toml --out runs/quickstart
    python benchmarks/latency.py runs/quickstart --repetitions 10 --loops 2 --json latency.json

Each repetition runs `r1export verify RUN`, whose reports say what L5 found of every release and of its unmerged control, and
times a slowed release as L5 does: the last one with as many extra MatMul nodes as take 3 % of its time. `verify` refuses
such a release before L5, as its program is another; here the clock alone has to notice it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from r1export.pipeline.context import NoProgress, RunContext
from r1export.pipeline.variant import REFERENCE, Variant
from r1export.pipeline.verification.contenders import make_contenders
from r1export.pipeline.verification.proof import unmerged
from r1export.report.json_format import read_report
from r1export.run_folder import RunFolder
from r1export.verify.golden import read_golden
from r1export.verify.latency import DEFAULT_BUDGET, added_latency
from r1export.verify.parity import ENTRIES
from r1export.verify.results import Latency, Ratio, RunReport

MARGIN, PAIRS = 0.02, 400  # the recipe's defaults
BUSY_LOOP, SLOWED = "while True: pass", "slowed"
SIDE = 256  # rows and columns of the matrix of an extra node
FEWEST_NODES = 10  # a quarter of the extra nodes that are tried first
Feeds = dict[str, np.ndarray]


@dataclass(frozen=True)
class Row:
    """What L5 says of one program by its deciding clock and, next to that, by the wall clock."""

    repetition: int
    program: str
    verdict: str
    clock: str
    merged: Ratio
    noise: Ratio
    unmerged: Ratio | None
    wall: Ratio
    wall_noise: Ratio


@dataclass(frozen=True)
class Verification:
    """One `r1export verify RUN`: its exit code, and the seconds that it took by the wall and of processor time."""

    exit_code: int
    seconds: float
    processor_seconds: float
    load: float


def main() -> None:
    asked = _arguments()
    verifications: list[Verification] = []
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        last = sorted((asked.run / "releases").iterdir())[-1]
        slowed, feeds = Path(folder), {ENTRIES["visual"]: read_golden(last).pixel_values[:1]}
        nodes = asked.nodes or nodes_for(last, asked.slower, feeds)
        write_slowed(last, slowed, nodes)
        print(f"slowed by {nodes} nodes", flush=True)
        with busy_loops(asked.loops), _last_release(asked.run) as graphs:
            for number in range(1, asked.repetitions + 1):
                if asked.clock_alone:
                    found = [_timed(graphs, feeds, number, last.name)]
                else:
                    verifications.append(verify(asked.run))
                    found = list(_verified(asked.run, number))
                found.append(_timed({"base": graphs["base"], "merged": slowed / "visual.onnx"}, feeds, number, SLOWED))
                rows += found
                print("\n".join(f"{number:>3} {_line(row)}" for row in found), flush=True)
                if asked.json:
                    document = _document(asked, nodes, verifications, rows)
                    asked.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(table(verifications, rows))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a trained and exported run; its reports are written again")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--loops", type=int, default=2, help="busy loops that run all the time")
    parser.add_argument("--slower", type=float, default=0.03, help="share of its time by which a release is slowed")
    parser.add_argument(
        "--nodes", type=int, default=0, help="extra nodes of the slowed release; 0 derives them from --slower"
    )
    parser.add_argument(
        "--clock-alone",
        action="store_true",
        help="time the last release and its control as L5 does; verify nothing else",
    )
    parser.add_argument("--json", type=Path, help="write everything as JSON, after each repetition")
    return parser.parse_args()


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """`count` processes that compute without end."""
    loops = [subprocess.Popen([sys.executable, "-c", BUSY_LOOP]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def nodes_for(release: Path, share: float, feeds: Feeds) -> int:
    """How many extra nodes take `share` of the time of the image tower of `release`, from the time that at least as many take."""
    nodes, added = FEWEST_NODES, 0.0
    with tempfile.TemporaryDirectory() as folder:
        graphs = {"base": release / "visual.onnx", "merged": Path(folder) / "visual.onnx"}
        while added < share:  # the time of too few nodes is lost in the noise
            nodes *= 4
            write_slowed(release, Path(folder), nodes)
            added = _timed(graphs, feeds, 0, SLOWED).merged.ratio - 1
    return max(1, round(nodes * share / added))


def write_slowed(release: Path, folder: Path, nodes: int) -> None:
    """The image tower of `release` with `nodes` extra products, and its weights, in `folder`.

    embeds + 1e-20 * (embeds A B ... B C): what the products of B take, and nothing that can be seen in the output.
    """
    shutil.copyfile(release / "visual.safetensors", folder / "visual.safetensors")
    model = onnx.load(release / "visual.onnx", load_external_data=False)
    output = model.graph.output[0]
    width, rng = output.type.tensor_type.shape.dim[1].dim_value, np.random.default_rng(0)
    shapes = {"slow.a": (width, SIDE), "slow.b": (SIDE, SIDE), "slow.c": (SIDE, width)}
    for name, shape in shapes.items():
        values = (rng.standard_normal(shape) / shape[0] ** 0.5).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    model.graph.initializer.append(numpy_helper.from_array(np.array(1e-20, np.float32), "slow.scale"))
    for node in model.graph.node:
        node.output[:] = ["embeds.plain" if name == output.name else name for name in node.output]
    value = "embeds.plain"
    for i, matrix in enumerate(["slow.a", *["slow.b"] * nodes, "slow.c"]):
        model.graph.node.append(helper.make_node("MatMul", [value, matrix], [f"slow.{i}"]))
        value = f"slow.{i}"
    model.graph.node.append(helper.make_node("Mul", [value, "slow.scale"], ["slow.end"]))
    model.graph.node.append(helper.make_node("Add", ["embeds.plain", "slow.end"], [output.name]))
    (folder / "visual.onnx").write_bytes(model.SerializeToString(deterministic=True))


def verify(run: Path) -> Verification:
    """Run the command line on the run."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "r1export", "verify", str(run)], capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Verification(done.returncode, time.perf_counter() - started, used, os.getloadavg()[0])


def _verified(run: Path, repetition: int) -> Iterator[Row]:
    report = read_report(run / "report.json", "verify the run again")
    assert isinstance(report, RunReport)  # it is the report of a run
    for release in report.releases:
        if release.latency.by_provider:
            yield _row(repetition, release.name, release.latency)


@contextmanager
def _last_release(run: Path) -> Iterator[dict[str, Path]]:
    """The image towers of the base, of the last release, and of its unmerged control."""
    context = RunContext(RunFolder(run), RunFolder(run).recipe(), "cpu", NoProgress())
    updates = context.run.updates(context.recipe)
    ref = Variant(context, REFERENCE).release(len(updates), updates)
    with unmerged(ref, "visual") as control:
        yield {"base": ref.base.path / "visual.onnx", "merged": ref.path / "visual.onnx", "unmerged": control}


def _timed(graphs: dict[str, Path], feeds: Feeds, repetition: int, program: str) -> Row:
    controls = {program: graphs["unmerged"]} if "unmerged" in graphs else {}
    contenders = make_contenders(graphs["base"], {program: graphs["merged"]}, controls, feeds, "cpu")
    return _row(repetition, program, added_latency(contenders, PAIRS, MARGIN, DEFAULT_BUDGET)[program])


def _row(repetition: int, program: str, latency: Latency) -> Row:
    assert latency.by_provider
    (provider,) = latency.by_provider.values()
    clocks = provider.clocks or {}
    by, wall = clocks[provider.clock], clocks["wall clock"]
    return Row(
        repetition, program, latency.verdict, provider.clock, by.merged, by.noise, by.unmerged, wall.merged, wall.noise
    )


def _line(row: Row) -> str:
    unmerged = f", unmerged {_interval(row.unmerged)}" if row.unmerged else ""
    return (
        f"{row.program}: {row.verdict} by {row.clock}, {_interval(row.merged)}, base again {_interval(row.noise)}{unmerged}; "
        f"wall clock {_interval(row.wall)}, base again {_interval(row.wall_noise)}"
    )


def _interval(found: Ratio) -> str:
    return f"{found.ratio:.3f} ({found.ci95[0]:.3f} to {found.ci95[1]:.3f})"


def table(verifications: Sequence[Verification], rows: Sequence[Row]) -> str:
    """Markdown: how often what was found, of the whole run, the releases, the unmerged controls and the slowed release."""
    releases = [row for row in rows if row.program != SLOWED]
    slowed = [row for row in rows if row.program == SLOWED]
    controls = [row.unmerged for row in releases if row.unmerged]
    lines = [
        f"| `verify RUN` | exit code 0 | {_share([v.exit_code == 0 for v in verifications])} |",
        f"| releases | L5 passed | {_share([row.verdict == 'pass' for row in releases])} |",
        f"| releases | L5 failed: a false alarm | {_share([row.verdict == 'fail' for row in releases])} |",
        f"| unmerged controls | whole interval above the margin | {_share([one.ci95[0] > 1 + MARGIN for one in controls])} |",
        f"| slowed release | not passed | {_share([row.verdict != 'pass' for row in slowed])} |",
        f"| slowed release | failed | {_share([row.verdict == 'fail' for row in slowed])} |",
        f"| wall clock | base against itself within the margin | {_share([row.wall_noise.within(MARGIN) for row in rows])} |",
    ]
    return "\n".join(["| what | found | how often |", "|---|---|---|", *lines])


def _share(found: Sequence[bool]) -> str:
    return f"{sum(found)} of {len(found)}"


def _document(
    asked: argparse.Namespace, nodes: int, verifications: Sequence[Verification], rows: Sequence[Row]
) -> dict[str, object]:
    return {
        "settings": {
            "repetitions": asked.repetitions,
            "loops": asked.loops,
            "slower": asked.slower,
            "extra_nodes": nodes,
        },
        "machine": {"cores": os.cpu_count(), "machine": platform.machine(), "onnxruntime": ort.__version__},
        "verifications": [asdict(one) for one in verifications],
        "rows": [asdict(row) for row in rows],
    }


if __name__ == "__main__":
    main()
