"""The small run of tests/device/fleet.py, for tests that make bundles."""

from pathlib import Path

import pytest
from device import fleet

from r1export.update.envelope import SecretKey


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    return fleet.make_run(tmp_path_factory.mktemp("lab") / "run")


@pytest.fixture(scope="session")
def key() -> SecretKey:
    return SecretKey(bytes(range(32)))
