"""Install the clients that `r1export layout --check` runs, each where it cannot disturb r1export.

    python scripts/layout_clients.py

Python clients go into build/layout-clients, a virtual environment of its own, because they need another onnxruntime package
than r1export; transformers.js goes into node_modules/layout-clients, at the versions and digests of tests/layout/clients.
Does nothing where they are there. Needs npm and a network. skopeo, which reads OCI layouts, comes from apt.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from runtime_matrix import environment

ROOT = Path(__file__).parents[1]
PINS = ROOT / "tests/layout/clients"
PYTHON = ROOT / "build/layout-clients"
NODE = ROOT / "node_modules/layout-clients"


def python_clients() -> None:
    """The virtual environment, made again when the pins change."""
    pins = (PINS / "requirements.txt").read_text(encoding="utf-8")
    mark = PYTHON / ".pins"
    if mark.is_file() and mark.read_text(encoding="utf-8") == pins:
        return
    shutil.rmtree(PYTHON, ignore_errors=True)
    environment(PYTHON, ["-r", str(PINS / "requirements.txt")])
    mark.write_text(pins, encoding="utf-8")


def node_clients() -> None:
    """`npm ci` without install scripts: onnxruntime-node's would only fetch CUDA libraries."""
    lock = (PINS / "package-lock.json").read_text(encoding="utf-8")
    mark = NODE / ".lock"
    if mark.is_file() and mark.read_text(encoding="utf-8") == lock:
        return
    npm = shutil.which("npm")
    if npm is None:
        sys.exit("Error: transformers.js comes from npm, which is not installed (apt install npm)")
    NODE.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copy(PINS / name, NODE)
    subprocess.run([npm, "ci", "--ignore-scripts", "--silent", "--no-audit", "--no-fund"], cwd=NODE, check=True)
    mark.write_text(lock, encoding="utf-8")


if __name__ == "__main__":
    python_clients()
    node_clients()
