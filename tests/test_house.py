"""The laws of docs/architecture.md, held by machines."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "r1export"


def test_imports_go_one_way() -> None:
    """The contracts in pyproject.toml: packages are independent, the device needs no torch, recipes stay with the pipeline."""
    script = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([script, "--no-logo"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout
    assert "0 broken" in result.stdout


def test_there_is_one_merge() -> None:
    """Law 1: nothing but update/factors.py multiplies factors with each other into a weight."""
    merging = [
        p.relative_to(PACKAGE).as_posix()
        for p in PACKAGE.rglob("*.py")
        if re.search(r"np\.multiply\([^)]*u\w*\[|\.u @|\.u\.astype\(.*@", p.read_text(encoding="utf-8"))
    ]
    assert merging == ["update/factors.py"]


def test_nothing_reads_or_writes_pickles() -> None:
    """torchvision reads its own CIFAR files that way; we do not."""
    users = [
        p.relative_to(PACKAGE).as_posix()
        for p in PACKAGE.rglob("*.py")
        if re.search(
            r"^\s*(import|from) pickle|torch\.load\(|torch\.save\(|allow_pickle=True",
            p.read_text(encoding="utf-8"),
            re.M,
        )
    ]
    assert users == []


def test_only_the_console_and_the_entry_points_print() -> None:
    """Workers are processes of their own: what they print is their answer to the one that started them."""

    def prints(path: Path) -> bool:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        return any(isinstance(n, ast.Call) and getattr(n.func, "id", "") == "print" for n in ast.walk(tree))

    clients = PACKAGE / "layout" / "clients"
    printers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if prints(path) and path.parent != clients
    }
    assert printers <= {
        "console.py",
        "cli/app.py",
        "device/__main__.py",
        "device/worker.py",
        "verify/steady_timing.py",
        "verify/trial.py",
    }
