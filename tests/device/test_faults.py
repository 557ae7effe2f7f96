"""Kills, full disks, input-output errors and power cuts at every step: the old version or the new one, never a mixture.

R1EXPORT_SWEEP=full hits every call with every fault (some minutes); otherwise every ninth case is tried.
"""

import importlib.util
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from r1export.device.store import _digest

STEP = 1 if os.environ.get("R1EXPORT_SWEEP") == "full" else 9
FAULTS = ("signal=SIGKILL", "error=ENOSPC", "error=EIO")


def load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


strace, powercut = load("strace"), load("powercut")
needs_strace = pytest.mark.skipif(not strace.available(), reason="strace is not installed or may not trace (apt-get install strace)")


@pytest.fixture(params=["slot", "overlay"])
def updated(lab, request, new_devices, tmp_path):
    """A device at version 1, and the calls that take it to version 2."""
    from conftest_device import Device

    old = Device(tmp_path / "old")
    shutil.copytree(new_devices[request.param], old.path, symlinks=True)
    old.apply(lab.bundle(1, 0))
    new = Device(tmp_path / "new")
    shutil.copytree(old.path, new.path, symlinks=True)
    calls = strace.record(new.path, lab.bundle(2, 1), tmp_path / "log")
    return old, new, calls
