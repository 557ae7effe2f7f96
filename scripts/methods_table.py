#!/usr/bin/env python3
"""Write README's table of methods from their results, benchmarks/results/methods.json: `scripts/methods_table.py [--check]`.

The results are what benchmarks/method.py writes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results" / "methods.json"
BEGIN, END = "<!-- made by scripts/methods_table.py -->\n", "<!-- end -->\n"
TITLES = {
    "ours": "**r1export's defaults**",
    "former": "the defaults of version 0.1",
    "faithful": "the method as published",
    "lora-r4": "LoRA of rank 4, merged",
}
COLUMNS = ("Transfer", "Avg", "Last", "probe")


def table(methods: dict[str, list[dict[str, Any]]]) -> str:
    """Means over the runs of each method, in percent, after what the base model does without training."""
    first = next(iter(methods.values()))
    before = (
        _mean(first, "zero-shot of later tasks"),
        _mean(first, "zero-shot"),
        _mean(first, "zero-shot"),
        _mean(first, "probe before"),
    )
    lines = [
        "| method | Transfer | Avg | Last | probe | shipped a task |",
        "|---" * 6 + "|",
        f"| the base model | {' | '.join(f'{value:.1f}' for value in before)} | |",
    ]
    for name, title in TITLES.items():
        if name in methods:
            cells = [f"{_mean(methods[name], column):.1f}" for column in COLUMNS]
            lines.append(f"| {title} | {' | '.join(cells)} | {_mean(methods[name], 'shipped kB'):.0f} kB |")
    return "\n".join(lines) + "\n"


def _mean(runs: list[dict[str, Any]], column: str) -> float:
    return float(np.mean([run[column] for run in runs]))


def page() -> str:
    """README with the table between its marks."""
    head, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    tail = rest.partition(END)[2]
    return head + BEGIN + table(json.loads(RESULTS.read_text(encoding="utf-8"))["methods"]) + END + tail


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(page() != README.read_text(encoding="utf-8"))
    README.write_text(page(), encoding="utf-8")
