"""The environment section of a report: versions, machine, time. torch isn't imported, since it takes seconds."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from r1export import __version__
from r1export.pipeline.cuda_driver import device_name
from r1export.verify.results import Environment
from r1export.verify.runtimes import openvino_runtime
from r1export.verify.runtimes.runtime import CORES, PROVIDERS


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that compute."""
    return {
        "python": platform.python_version(), "torch": version("torch"), "open_clip": version("open_clip_torch"),
        "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__, "numpy": np.__version__,
    }  # fmt: skip


def environment(providers: Sequence[str]) -> Environment:
    """The environment of a verification on `providers`."""
    return Environment(
        r1export=__version__,
        **versions(),
        cpu=_cpu_name(),
        threads=CORES,
        os=f"{platform.system()} {platform.machine()}",
        gpu=device_name(),
        runtimes=runtimes(providers),
        openvino=version("openvino") if "openvino" in providers else None,
    )


def absent(provider: str) -> str:
    """Why a provider is not available on this machine; empty if it is."""
    if provider == "openvino" and not openvino_runtime.installed():
        return "not installed"
    if provider in ("cuda", "tensorrt"):
        if device_name() is None:
            return "no device"
        if PROVIDERS[provider].name not in onnxruntime.get_available_providers():
            return "not in this build of onnxruntime"
    return ""


def runtimes(measured: Sequence[str]) -> dict[str, str]:
    """For every runtime that r1export supports: "measured", or why it was not."""
    return {
        provider.label: "measured"
        if name in measured
        else f"not measured, {absent(name) or f'not requested (--provider {name})'}"
        for name, provider in PROVIDERS.items()
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
