"""Which versions, on which machine, when: what a report has to say about where it was made."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from r1export import __version__


def versions() -> dict[str, str]:
    import onnx
    import onnxruntime
    import open_clip

    return {
        "python": platform.python_version(), "torch": torch.__version__, "open_clip": open_clip.__version__, "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__, "numpy": np.__version__,
    }  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions and the machine, for reports."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return versions() | {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "os": f"{platform.system()} {platform.machine()}",
        "gpu": gpu,
    }


def report_head() -> dict[str, Any]:
    """What every report begins with."""
    return {"verdict": "pass", "reasons": [], "created": now(), "r1export": __version__, "environment": environment()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
