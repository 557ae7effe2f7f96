#!/usr/bin/env python3
"""Write the tables of methods in README and docs/experiments/forgetting.md from benchmarks/results/methods*.json.

    scripts/methods_table.py [--check]

The results are what benchmarks/method.py writes. README shows a few methods, the experiments all of them, with the standard
deviation over runs and the differences of r1export's defaults to each, with their standard error over the runs of both with the
same seed and order.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
README, EXPERIMENTS = ROOT / "README.md", ROOT / "docs" / "experiments" / "forgetting.md"
RESULTS = ROOT / "benchmarks" / "results"
OF_PHOTO, OF_OTHERS = "methods", "methods-other-tasks"  # the files of builtin:photo
OF_VIT = "methods-vit"  # of builtin:photo-vit
BEGIN, END = "<!-- {} by scripts/methods_table.py -->\n", "<!-- end -->\n"
TITLES = {
    "ours": "**r1export's defaults**",
    "no-pool": "the same with a LoRA of rank 4 instead of the pool",
    "votes": "the same, experts selected by votes",
    "random-init": "experts selected by votes and started at random, distillation 1.0",
    "former": "the defaults of version 0.1",
    "faithful": "the method as published",
    "random-4-of-12": "4 of 12 experts at random",
    "lora-r4": "LoRA of rank 4, merged",
    "lora-r12": "LoRA of rank 12, merged",
    "keep-lora": "KeepLoRA, rank 4",
    "codyra": "CoDyRA",
    "full": "full fine-tuning",
}
IN_README = ("ours", "faithful", "lora-r4", "full")
COLUMNS = ("Transfer", "Avg", "Last", "probe")
BEFORE = ("zero-shot of later tasks", "zero-shot", "zero-shot", "probe before")
Runs = Sequence[dict[str, Any]]  # of one method


def short_table(methods: dict[str, Runs]) -> str:
    """Means over the runs that all of these methods have, in percent, after the accuracies of the base model."""
    keys = set.intersection(*({_key(run) for run in methods[name]} for name in IN_README))
    methods = {name: [run for run in methods[name] if _key(run) in keys] for name in IN_README}
    lines = [
        f"Five tasks in sequence on `builtin:photo`, means of {len(keys)} runs; the probe is ImageNet, 1000-way "
        "([all methods](docs/experiments/forgetting.md)).",
        "",
        f"| method | {' | '.join(COLUMNS)} | shipped a task |",
        "|---" * 6 + "|",
        f"| the base model | {' | '.join(_mean(methods['ours'], column) for column in BEFORE)} | |",
    ]
    for name in IN_README:
        cells = [_mean(methods[name], column) for column in COLUMNS]
        lines.append(f"| {TITLES[name]} | {' | '.join(cells)} | {_size(methods[name])} |")
    return "\n".join(lines) + "\n"


def full_table(methods: dict[str, Runs]) -> str:
    """Mean and standard deviation of every method, size and time, and the differences of `ours` to it."""
    lines = [
        f"| method | runs | {' | '.join(COLUMNS)} | a task | s | ours minus it: {' | '.join(COLUMNS)} |",
        "|---" * 12 + "|",
        f"| zero-shot | {len(methods['ours'])} | {' | '.join(_mean(methods['ours'], c) for c in BEFORE)} | 0 | 0 | | | | |",
    ]
    for name, title in TITLES.items():
        if name in methods:
            runs = methods[name]
            cells = [_spread(runs, c) for c in COLUMNS]
            gains = [""] * 4 if name == "ours" else [_gain(methods["ours"], runs, c) for c in COLUMNS]
            figures = (str(len(runs)), *cells, _size(runs), f"{np.mean(_values(runs, 'seconds')):.0f}", *gains)
            lines.append(f"| {title} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def _values(runs: Runs, column: str) -> np.ndarray:
    return np.array([run[column] for run in runs], float)


def _key(run: dict[str, Any]) -> tuple[str, int]:
    return run["order"], run["seed"]


def _mean(runs: Runs, column: str) -> str:
    return f"{_values(runs, column).mean():.1f}"


def _spread(runs: Runs, column: str) -> str:
    """The mean, and the standard deviation if there is one."""
    return f"{_mean(runs, column)}" + (f" ± {_values(runs, column).std(ddof=1):.1f}" if len(runs) > 1 else "")


def _size(runs: Runs) -> str:
    kilobytes = _values(runs, "shipped kB").mean()
    return f"{kilobytes:.0f} kB" if kilobytes < 10_000 else f"{kilobytes / 1000:.0f} MB"


def _gain(ours: Runs, runs: Runs, column: str) -> str:
    """Over the pairs of runs with the same seed and order."""
    others = {_key(run): run[column] for run in runs}
    gains = np.array([run[column] - others[_key(run)] for run in ours if _key(run) in others])
    return f"{gains.mean():+.1f}" + (f" ± {gains.std(ddof=1) / len(gains) ** 0.5:.1f}" if len(gains) > 1 else "")


def with_table(page: str, results: str, table: str) -> str:
    """The page with the table of these results between its marks."""
    head, begin, rest = page.partition(BEGIN.format(results))
    return head + begin + table + END + rest.partition(END)[2] if begin else page


def main() -> None:
    pages = {path: path.read_text(encoding="utf-8") for path in (README, EXPERIMENTS)}
    made = dict(pages)
    for results, path, table in (
        (OF_PHOTO, README, short_table),
        (OF_PHOTO, EXPERIMENTS, full_table),
        (OF_VIT, EXPERIMENTS, full_table),
        (OF_OTHERS, EXPERIMENTS, full_table),
    ):
        methods = json.loads((RESULTS / f"{results}.json").read_text(encoding="utf-8"))["methods"]
        made[path] = with_table(made[path], results, table(methods))
    if "--check" in sys.argv:
        sys.exit(made != pages)
    for path, text in made.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
