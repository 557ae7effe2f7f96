"""Small real releases, and the clients that open layouts where scripts/layout_clients.py installed them."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from running import RECIPE, Lab, trained_run

from r1export.errors import Unsupported
from r1export.layout.check import ClientResult, check_layout

ROOT = Path(__file__).parents[2]
PYTHON, NODE = ROOT / "build/layout-clients/bin/python", ROOT / "node_modules/layout-clients"
OWN_PYTHON = ("openclip", "ovms")  # what r1export's own environment has
REQUIRED = ("transformersjs", "fastembed")  # what has to run where R1EXPORT_CLIENTS=required says so


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A run of one task with an fp16 and an int8 variant."""
    recipe = RECIPE + '[export]\nvariants = ["fp16", "int8"]\n'
    return Lab.of(trained_run(tmp_path_factory.mktemp("layout"), recipe, "train.iterations=20"))


def run_client(folder: Path, kind: str) -> ClientResult:
    """What the installed client makes of the layout; skips where it is missing, unless it has to be there."""
    python = None if kind in OWN_PYTHON else PYTHON
    needed = ("skopeo",) if kind == "oci" else ()
    there = all(map(shutil.which, needed)) and (python is None or python.exists())
    lack = "" if there else f"the client of {kind} is not installed: python scripts/layout_clients.py"
    with suppress(Unsupported):
        if there:
            return check_layout(folder, python=python, node_modules=NODE)
    if kind in REQUIRED and os.environ.get("R1EXPORT_CLIENTS") == "required":
        pytest.fail(lack or f"the client of {kind} does not start")
    pytest.skip(lack or f"the client of {kind} does not start")
