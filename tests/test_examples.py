"""The programs and the notebook in examples/, run as a user runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image
from running import Lab

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
QUICK = ("train.iterations=2", "data.test_limit=20", "data.shots=2", "verify.samples=4", "verify.images=8", "verify.pairs=20", "verify.margin=0.9")  # fmt: skip


def example(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )


def test_every_example_is_listed() -> None:
    index = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"]({path.name})" in index for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb"))
