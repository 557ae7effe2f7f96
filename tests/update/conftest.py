"""The small run of tests/device/fleet.py, for tests that make bundles."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from r1export.update.envelope import SecretKey


@pytest.fixture(scope="session")
def fleet() -> ModuleType:
    path = Path(__file__).parents[1] / "device" / "fleet.py"
    spec = importlib.util.spec_from_file_location("fleet", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def run(fleet, tmp_path_factory) -> Path:
    return fleet.make_run(tmp_path_factory.mktemp("lab") / "run")


@pytest.fixture(scope="session")
def key() -> SecretKey:
    return SecretKey(bytes(range(32)))
