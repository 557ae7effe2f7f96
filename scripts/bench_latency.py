"""How sure is the proof of zero added latency? Repeats it on a model with random weights and counts what it says.

    python scripts/bench_latency.py --model ViT-B-32 --repetitions 20 --out latency.json

Each repetition opens fresh sessions, interleaved at random, of five contenders: the base, the base again (noise floor),
the base a third time (A/A: must never fail), the merged model (must never fail), and the model with its low-rank
branches (must be flagged, by the ladder and by the clock). Timing wants a quiet machine: the noise floor is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import open_clip
import torch
from torch import nn

from r1export.export.graph import export_graphs
from r1export.update.container import write_layout
from r1export.update.factors import ExpertUpdate, Factors, Rows
from r1export.verify import proof
from r1export.verify.latency import time_rounds
from r1export.verify.paired_stats import latency_verdict, paired_ratio
from r1export.verify.runtimes.runtime import job, open_session
from r1export.verify.unmerged_graph import add_branches

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
EXPERTS = 4  # per adapted linear, as the recipe's k_merge


def main() -> None:
    asked = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        base, merged, unmerged, size = _models(asked.model, Path(folder))
        feeds = {"pixel_values": np.random.default_rng(0).normal(size=(asked.batch, 3, *size)).astype(np.float32)}
        ladder = _ladder(base, merged, unmerged, feeds)
        print(f"ladder: {ladder}", flush=True)
        graphs = {"base": base, "again": base, "same": base, "merged": merged, "unmerged": unmerged}
        rows = []
        for repetition in range(asked.repetitions):
            rows.append(_repetition(graphs, feeds, asked, repetition))
            print(_line(repetition, rows[-1]), flush=True)
    settings = {key: value for key, value in vars(asked).items() if key != "out"}
    found = {
        "settings": settings,
        "ladder": ladder,
        "counts": _counts(rows, asked.margin),
        "machine": _machine(),
        "repetitions": rows,
    }
    for name, counts in found["counts"].items():
        print(f"{name:>9}: " + ", ".join(f"{verdict} {count} of {len(rows)}" for verdict, count in counts.items()))
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ViT-B-32", help="open_clip model, with random weights")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--blocks", type=int, default=10, help="times that all sessions are opened afresh")
    parser.add_argument("--rounds", type=int, default=5, help="rounds per block; each runs every contender twice")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="threads of a session, 0 for all cores")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: time of this process alone")
    parser.add_argument("--margin", type=float, default=0.02)
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    return parser.parse_args()


def _models(name: str, folder: Path) -> tuple[Path, Path, Path, tuple[int, int]]:
    """Visual graphs of the base, the merged and the unmerged model, and the image size."""
    torch.manual_seed(0)
    model = open_clip.create_model(name, load_weights=False).eval()
    size = model.visual.image_size if isinstance(model.visual.image_size, tuple) else (model.visual.image_size,) * 2
    graphs = folder / "graphs"
    graphs.mkdir()
    weights = export_graphs(model, size, model.context_length, graphs, opset=20)
    base = {key: value.detach().numpy() for key, value in model.state_dict().items() if value.is_floating_point()}
    update = _update(model)
    found = []
    for kind, values in (("base", base), ("merged", base | update.apply(base)), ("unmerged", base)):
        place = folder / kind
        place.mkdir()
        stored = weights.stored("visual.safetensors", values)
        write_layout(
            place / "visual.safetensors",
            weights.layout("visual.safetensors"),
            lambda spec, stored=stored: stored[spec.name],
        )
        if kind == "unmerged":
            add_branches(graphs / "visual.onnx", update, place / "visual.onnx")
        else:
            (place / "visual.onnx").write_bytes((graphs / "visual.onnx").read_bytes())
        found.append(place / "visual.onnx")
    return (*found, size)


def _update(model: nn.Module) -> ExpertUpdate:
    """Random experts beside q, k, v, out, fc and proj of every block of the visual tower."""
    rng, factors = np.random.default_rng(1), {}
    for name, parameter in model.named_parameters():
        if not name.startswith("visual.") or ".resblocks." not in name or parameter.ndim != 2:
            continue
        rows, parts = parameter.shape[0], 3 if name.endswith("in_proj_weight") else 1
        for i in range(parts):
            start, stop = i * rows // parts, (i + 1) * rows // parts
            u, v = (
                0.01 * rng.normal(size=shape).astype(np.float32)
                for shape in ((stop - start, EXPERTS), (EXPERTS, parameter.shape[1]))
            )
            factors[Rows(name, start, stop)] = Factors(u, v)
    return ExpertUpdate(factors)


def _ladder(base: Path, merged: Path, unmerged: Path, feeds: dict[str, np.ndarray]) -> dict[str, str]:
    graphs = [{"visual.onnx": path} for path in (base, merged)]
    rungs = {"same_file": proof.same_files(*graphs), "graph": proof.same_graphs(*graphs)}
    rungs |= proof.rungs(
        proof.executions(graphs[0], {"visual.onnx": feeds}, ["cpu"]),
        lambda: proof.executions(graphs[1], {"visual.onnx": feeds}, ["cpu"]),
    )
    control = proof.proof_control(base, unmerged, feeds)["unmerged"]
    return {name: rung["verdict"] for name, rung in rungs.items()} | {"control": control["detail"]}


def _repetition(
    graphs: dict[str, Path], feeds: dict[str, np.ndarray], asked: argparse.Namespace, seed: int
) -> dict[str, Any]:
    """Ratios to the base with their intervals, and the verdict on each contender."""
    rng, blocks = np.random.default_rng(seed), []
    for _ in range(asked.blocks):
        order = [str(name) for name in rng.permutation(list(graphs))]
        blocks.append(
            time_rounds(
                {name: job(open_session(graphs[name], threads=asked.threads), feeds, "cpu") for name in order},
                asked.rounds,
                rng,
                CLOCKS[asked.clock],
            )
        )
    seconds = {name: np.stack([block[name] for block in blocks]) for name in graphs}
    ratios = {name: paired_ratio(values, seconds["base"]) for name, values in seconds.items() if name != "base"}
    verdicts = {
        name: latency_verdict(ratios[name], ratios["again"], asked.margin)[0] for name in ("same", "merged", "unmerged")
    }
    return {
        "base_ms": 1000 * float(np.median(seconds["base"])), "verdicts": verdicts, "load": os.getloadavg()[0],
        "ratios": {name: [ratio.low, ratio.value, ratio.high] for name, ratio in ratios.items()},
    }  # fmt: skip


def _line(repetition: int, row: dict[str, Any]) -> str:
    shown = "  ".join(
        f"{name} {value:.3f} ({low:.3f} to {high:.3f})" for name, (low, value, high) in row["ratios"].items()
    )
    return f"{repetition + 1:>3}  base {row['base_ms']:.1f} ms  {shown}  {' '.join(f'{k}={v}' for k, v in row['verdicts'].items())}  load {row['load']:.1f}"


def _counts(rows: list[dict[str, Any]], margin: float) -> dict[str, dict[str, int]]:
    """Verdicts of the clock, and how often the whole interval of the unmerged model lies above the margin."""
    counts = {name: dict(Counter(row["verdicts"][name] for row in rows)) for name in ("same", "merged", "unmerged")}
    counts["unmerged slower than the margin"] = {"yes": sum(row["ratios"]["unmerged"][0] > 1 + margin for row in rows)}
    return counts


def _machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "onnxruntime": ort.__version__,
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
    }


if __name__ == "__main__":
    main()
