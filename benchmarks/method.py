"""Compare the method with its baselines on one sequence of tasks: several seeds and orders, one table.

    python benchmarks/method.py recipes/mini-mtil.toml --seeds 1 2 3 --orders forward reversed --scaling 1 --out runs/methods

Each of recipes/baselines is applied on top of the recipe and trained by `r1export train` in a process of its own, `--jobs`
at a time on one thread each. What is there already is not trained again, so a stopped benchmark goes on.
`--scaling` gives every method the same scaling, which is alpha / rank: with the same alpha a LoRA of rank 4 would
learn with three times that of a pool of 12. Differences are those of `ours` to the others, over pairs of the same seed and order.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, product
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np

from r1export.recipe_file import load_recipe

BASELINES = Path(__file__).parents[1] / "recipes" / "baselines"
KEEP_LORA = Path(__file__).with_name("keep_lora.py")  # trains by r1export's trainer with changes of its own
Column = Literal["Transfer", "Avg", "Last", "probe", "trainable", "shipped kB", "seconds"]
COLUMNS: tuple[Column, ...] = ("Transfer", "Avg", "Last", "probe", "trainable", "shipped kB", "seconds")
# One run in methods.json, accuracies in per cent; None without a probe, and Transfer of a single task.
Figures = TypedDict("Figures", {
    "order": str, "seed": int, "Transfer": float | None, "Avg": float, "Last": float, "probe": float | None,
    "trainable": int, "shipped kB": float, "seconds": float,
    "zero-shot": float, "zero-shot of later tasks": float, "probe before": float | None,
})  # fmt: skip
Runs = list[Figures]  # of one method


def main() -> None:
    asked = _arguments()
    names = asked.methods or sorted(path.stem for path in BASELINES.glob("*.toml"))
    _lay_over(asked.stream, asked.out)
    pairs = (
        list(zip(cycle(asked.orders), asked.seeds, strict=False))
        if asked.alternate
        else list(product(asked.orders, asked.seeds))
    )
    jobs = [(name, *pair) for name in names for pair in pairs]
    with ThreadPoolExecutor(asked.jobs) as pool:
        found = list(pool.map(lambda job: _train(asked, *job), jobs))
    rows = {
        name: [figures for (method, *_), figures in zip(jobs, found, strict=True) if method == name] for name in names
    }
    print(_table(rows))
    print(_differences(rows, len(pairs)))
    text = json.dumps({"stream": str(asked.stream), "set": asked.set, "methods": rows}, indent=2)
    (asked.out / "methods.json").write_text(text + "\n", encoding="utf-8")


def _lay_over(stream: Path, out: Path) -> None:
    """Copies of the baselines that extend `stream` instead of mini-MTIL."""
    out.mkdir(parents=True, exist_ok=True)
    for path in (*BASELINES.glob("*.toml"), KEEP_LORA.with_name("keep-lora.toml")):
        text = path.read_text(encoding="utf-8")
        (out / path.name).write_text(re.sub(r'"[^"]*/mini-mtil.toml"', f'"{stream.resolve()}"', text), encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stream", type=Path, help="recipe with the base and the tasks")
    parser.add_argument("--methods", nargs="*", help="names in recipes/baselines; all if not given")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--orders", nargs="+", choices=("forward", "reversed"), default=["forward"])
    parser.add_argument("--alternate", action="store_true", help="one order per seed, in turn, instead of all with all")
    parser.add_argument("--scaling", type=float, help="alpha / rank of every method instead of the recipes' alpha")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="for every run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def _train(asked: argparse.Namespace, method: str, order: str, seed: int) -> Figures:
    """The figures of one run, trained if it is not there. SystemExit with what the command said if it fails."""
    run = asked.out / f"{method}-{order}-{seed}"
    program = [KEEP_LORA] if method == "keep-lora" else ["-m", "r1export"]
    command = [sys.executable, *program, "train", asked.out / f"{method}.toml", "--out", run, "--resume"]
    sets = [*asked.set, f"train.seed={seed}"]
    if asked.scaling:
        rank = load_recipe(asked.out / f"{method}.toml", tuple(sets)).pool.rank
        sets.append(f"pool.alpha={asked.scaling * rank}")
    command += [part for value in sets for part in ("--set", value)]
    command += ["--order", "reversed"] if order == "reversed" else []
    if not (run / "metrics.json").exists():
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{run}: {done.stderr.strip().splitlines()[-1]}")
    found = _figures(run, order, seed)
    print(
        f"{run.name}: " + ", ".join(f"{c} {value:.1f}" for c in COLUMNS[:4] for value in _values([found], c)),
        flush=True,
    )
    return found


def _figures(run: Path, order: str, seed: int) -> Figures:
    metrics = json.loads((run / "metrics.json").read_text())
    tasks = [json.loads(path.read_text()) for path in sorted(run.glob("tasks/*/metrics.json"))]
    probe = metrics["probe"]["values"] if metrics["probe"] else [None]
    return {
        "order": order,
        "seed": seed,
        "Transfer": _percent(metrics["transfer"]),
        "Avg": 100 * metrics["avg"],
        "Last": 100 * metrics["last"],
        "probe": _percent(probe[-1]),
        "trainable": tasks[0]["trainable_parameters"],
        "shipped kB": sum(task["factor_bytes"] for task in tasks) / len(tasks) / 1000,
        "seconds": sum(task["seconds"] for task in tasks),
        "zero-shot": 100 * metrics["zero_shot_avg"],
        "zero-shot of later tasks": 100 * float(np.mean(metrics["zero_shot"][1:])),
        "probe before": _percent(probe[0]),
    }


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _values(runs: Runs, column: Column) -> list[float]:
    """Of the runs that have this figure."""
    return [value for run in runs if (value := run[column]) is not None]


def _table(rows: dict[str, Runs]) -> str:
    """Mean and, over seeds and orders, standard deviation."""
    first = next(iter(rows.values()))[0]
    lines = ["| method | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    nothing = [
        first["zero-shot of later tasks"],
        first["zero-shot"],
        first["zero-shot"],
        first["probe before"],
        0,
        0,
        0,
    ]
    lines.append(
        "| zero-shot | "
        + " | ".join("-" if v is None else f"{v:.1f}" if i < 4 else "0" for i, v in enumerate(nothing))
        + " |"
    )
    for name, runs in rows.items():
        cells = []
        for column in COLUMNS:
            values = _values(runs, column)
            digits = 1 if column in COLUMNS[:4] else 0
            spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 and digits else ""
            cells.append(f"{np.mean(values):.{digits}f}{spread}" if values else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _differences(rows: dict[str, Runs], pairs: int) -> str:
    """`ours` minus each other method, mean and standard error over the pairs of one order and seed."""
    if "ours" not in rows or pairs < 2:
        return ""
    lines = [
        f"\n`ours` minus the others, {pairs} pairs\n",
        "| method | " + " | ".join(COLUMNS[:4]) + " |",
        "|---" * 5 + "|",
    ]
    for name in (name for name in rows if name != "ours"):
        cells = []
        for column in COLUMNS[:4]:
            gains = [
                ours - other
                for a, b in zip(rows["ours"], rows[name], strict=True)
                if (ours := a[column]) is not None and (other := b[column]) is not None
            ]
            error = np.std(gains, ddof=1) / len(gains) ** 0.5 if gains else 0
            cells.append(f"{np.mean(gains):+.1f} ± {error:.1f}" if gains else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
