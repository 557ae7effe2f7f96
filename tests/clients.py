"""A client as the model card promises it: a Python that has numpy, Pillow, onnxruntime and tokenizers, and nothing else of the lab."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

FORBIDDEN = ("torch", "torchvision", "open_clip", "r1export", "safetensors", "transformers", "onnx", "ftfy")
GATE = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FORBIDDEN!r}:
            raise ModuleNotFoundError(name + ": a client has none")
sys.meta_path.insert(0, Refuse())
"""


def snippets(card: str) -> list[str]:
    """The code blocks of a model card, as they stand."""
    return re.findall(r"```python\n(.*?)```", card, re.S)


def run_as_client(code: str, folder: Path) -> str:
    """What the code prints, run in `folder` by an isolated Python."""
    command = [sys.executable, "-I", "-c", GATE + code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout
