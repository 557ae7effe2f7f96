"""One export of the tiny model, shared by the tests that only read it."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def exporting() -> ModuleType:
    path = Path(__file__).with_name("exporting.py")
    spec = importlib.util.spec_from_file_location("exporting", path)
    module = sys.modules["exporting"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def exported(exporting, tiny_files, tmp_path_factory):
    from r1export.adapt.clip import load_clip

    model = load_clip(weights=tiny_files[0], config=tiny_files[1]).model
    exporting.randomize_(model, 1)
    return exporting.export(model, tmp_path_factory.mktemp("exported"))
