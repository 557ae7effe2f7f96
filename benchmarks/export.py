"""Export time, peak memory and latency of our graphs and Optimum's, in one run: prints tables, writes JSON.

    python benchmarks/export.py --models ViT-B-32 ViT-B-16 --optimum OPTIMUM_VENV/bin/python --out export.json

Random weights: time depends on shapes. Optimum exports both towers as one graph; its image half is cut out of that.
Every export runs in a process of its own, so that its peak memory is its own; contenders alternate, and the ratio is the
median over `--exports` pairs. Ours is the graphs, their proof in onnxruntime and the weights files; Optimum's is its export
without validation. Imports and the model's construction are not counted. A later release is what is written again: the
weights files, without the merge before and the manifest after.
Latencies are interleaved in random order on one thread and counted in CPU time of that thread, which other processes
on the machine do not lengthen. Optimum is optional and lives in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypedDict

import numpy as np

USED = """{"seconds": time.perf_counter() - start[0], "processor_seconds": time.process_time() - start[1],
    "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}"""
OURS = """
import json, logging, resource, sys, time
logging.disable(logging.WARNING)
from pathlib import Path
import open_clip
from r1export.export.graph import export_graphs
from r1export.export.towers import float_tensors
from r1export.update.container import write_tensors
model, folder = open_clip.create_model(sys.argv[1], load_weights=False).eval(), Path(sys.argv[2])
size = model.visual.image_size
start = time.perf_counter(), time.process_time()
weights = export_graphs(model, size if isinstance(size, tuple) else (size, size), 77, folder, opset=20)
state = {name: tensor.detach().numpy() for name, tensor in float_tensors(model).items()}
for file in weights.files:
    write_tensors(folder / file, weights.stored(file, state))
print(json.dumps(USED))
"""
RELEASE = """
import json, resource, sys, time
from pathlib import Path
import numpy as np
from r1export.export.weight_map import WeightMap
from r1export.update.container import write_layout
folder = Path(sys.argv[1])
weights = WeightMap.read(folder / "weight_map.json")
rng = np.random.default_rng(0)
state = {n: rng.standard_normal(p.shape[::-1] if p.transposed else p.shape, np.float32) * 0.02 for n, (_, p) in weights.placements().items()}
start = time.perf_counter(), time.process_time()
for file in weights.files:
    stored = weights.stored(file, state)
    write_layout(folder / file, weights.layout(file), lambda spec: stored[spec.name])
print(json.dumps(USED))
"""
OPTIMUM = """
import json, resource, sys, time, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import onnx.utils
from optimum.exporters.onnx import onnx_export_from_model
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
patch, folder = int(sys.argv[1]), Path(sys.argv[2])
vision, text = CLIPVisionConfig(patch_size=patch, hidden_act="gelu"), CLIPTextConfig(hidden_act="gelu")
model = CLIPModel(CLIPConfig.from_text_vision_configs(text, vision, projection_dim=512)).eval()
start = time.perf_counter(), time.process_time()
onnx_export_from_model(model, folder / "both", task="zero-shot-image-classification", do_validation=False)
used = USED
onnx.utils.extract_model(folder / "both" / "model.onnx", folder / "optimum_visual.onnx", ["pixel_values"], ["image_embeds"])
print(json.dumps(used))
"""


Used = dict[str, float]  # what a process prints, by the names in USED


class Ratio(TypedDict):
    """Our time over another's, with its 95 % interval over `n` pairs, and the median time of the other."""

    median_ms: float
    ours_to_it: float
    ci95: list[float]
    n: int


class Measured(TypedDict):
    """One architecture: exports by job, ratios of the first exports by clock, and latencies by batch and contender."""

    exports: dict[str, Used]
    ours_to_optimum: dict[str, Ratio] | None
    latency: dict[int, dict[str, Ratio]]


def child(python: str, code: str, *arguments: str) -> Used:
    command = [python, "-c", code.replace("USED", USED), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(
            f"{Path(python).name} failed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}"
        )
    used: Used = json.loads(done.stdout.strip().splitlines()[-1])
    return used


def measure(name: str, folder: Path, optimum: str | None, options: argparse.Namespace) -> Measured:
    """All figures of one architecture."""
    graphs = {"ours": folder / "ours" / "visual.onnx"}
    jobs = {"ours, first export": (sys.executable, OURS, name, str(folder / "ours"))}
    if optimum:
        jobs["Optimum, every export"] = (optimum, OPTIMUM, name.rsplit("-", 1)[1], str(folder))
        graphs["Optimum"] = folder / "optimum_visual.onnx"
    (folder / "ours").mkdir()
    runs: dict[str, list[Used]] = {job: [] for job in jobs}
    for i in range(options.exports):
        for job in sorted(jobs, reverse=bool(i % 2)):
            runs[job].append(child(*jobs[job]))
            print(name, job, runs[job][-1], file=sys.stderr, flush=True)
    runs["ours, later release"] = [child(sys.executable, RELEASE, str(folder / "ours"))]
    return {
        "exports": {job: _medians(rows) for job, rows in runs.items()},
        "ours_to_optimum": _export_ratios(runs) if optimum else None,
        "latency": {
            batch: latency(name, graphs, batch, max(4, options.rounds // batch)) for batch in (1, 8) if options.rounds
        },
    }


def _medians(rows: list[Used]) -> Used:
    return {figure: float(np.median([row[figure] for row in rows])) for figure in rows[0]}


def _export_ratios(runs: dict[str, list[Used]]) -> dict[str, Ratio]:
    """Ours / Optimum by clock, over pairs."""
    ours, other = runs["ours, first export"], runs["Optimum, every export"]
    rng = np.random.default_rng(2)
    return {
        clock: _ratio(np.array([row[clock] for row in ours]), np.array([row[clock] for row in other]), rng)
        for clock in ("seconds", "processor_seconds")
    }


def latency(name: str, graphs: dict[str, Path], batch: int, rounds: int) -> dict[str, Ratio]:
    """Median milliseconds of the visual tower by contender, and its ratio to ours with a 95 % interval."""
    import open_clip
    import torch

    from r1export.verify.runtimes.runtime import open_session

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    model = open_clip.create_model(name, load_weights=False).eval()
    size = model.visual.image_size
    pixels = (
        np.random.default_rng(0)
        .standard_normal((batch, 3, *(size if isinstance(size, tuple) else (size, size))))
        .astype(np.float32)
    )
    jobs: dict[str, Callable[[], object]] = {
        contender: partial(open_session(path, threads=1).run, None, {"pixel_values": pixels})
        for contender, path in graphs.items()
    }
    tensor = torch.from_numpy(pixels)
    jobs["eager torch"] = lambda: model.encode_image(tensor, normalize=True)
    rng = np.random.default_rng(1)
    seconds: dict[str, list[float]] = {contender: [] for contender in jobs}
    with torch.no_grad():
        for i in range(rounds + 1):
            for contender in rng.permutation(list(jobs)):
                start = time.thread_time()
                jobs[contender]()
                if i:  # the first round warms up
                    seconds[contender].append(time.thread_time() - start)
    return {contender: _ratio(np.array(seconds["ours"]), np.array(taken), rng) for contender, taken in seconds.items()}


def _ratio(ours: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> Ratio:
    logs = np.log(ours / other)
    boot = np.exp([np.median(rng.choice(logs, len(logs))) for _ in range(1000)])
    interval = [float(q) for q in np.quantile(boot, [0.025, 0.975])]
    return {
        "median_ms": 1000 * float(np.median(other)),
        "ours_to_it": float(np.exp(np.median(logs))),
        "ci95": interval,
        "n": len(logs),
    }


def tables(name: str, found: Measured) -> str:
    """What is printed of one architecture."""
    lines = [
        f"## {name}\n\n| export of both towers | seconds | processor seconds | peak memory, GB |\n|---|---|---|---|"
    ]
    for what, used in found["exports"].items():
        lines.append(f"| {what} | {used['seconds']:.1f} | {used['processor_seconds']:.1f} | {used['peak_gb']:.2f} |")
    for clock, one in (found["ours_to_optimum"] or {}).items():
        lines.append(f"\nours / Optimum, {clock}: {one['ours_to_it']:.3f} ({_interval(one)}, {one['n']} pairs)")
    lines.append("\n| visual tower, 1 thread | batch | median ms | ours / it | 95 % |\n|---|---|---|---|---|")
    for batch, contenders in found["latency"].items():
        for contender, one in contenders.items():
            lines.append(
                f"| {contender} | {batch} | {one['median_ms']:.1f} | {one['ours_to_it']:.3f} | {_interval(one)} |"
            )
    return "\n".join(lines) + "\n"


def _interval(found: Ratio) -> str:
    low, high = found["ci95"]
    return f"{low:.3f} to {high:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ViT-B-16"])
    parser.add_argument("--optimum", help="python of an environment with optimum-onnx")
    parser.add_argument("--exports", type=int, default=5, help="pairs of first exports")
    parser.add_argument("--rounds", type=int, default=24, help="of the latency; 0 leaves it out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not options.optimum:
        print("Optimum is absent: give --optimum PYTHON to compare with it\n")
    results: dict[str, Measured] = {}
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(name, Path(folder), options.optimum, options)
        print(tables(name, results[name]), flush=True)
        if options.out:  # after each model, so that a run that is stopped keeps what it has
            options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
