"""A verified run that tests of updates share."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import RECIPE, r1export, trained_run

TWO_TASKS = RECIPE.replace("[train]", '[[tasks]]\nname = "arrows"\nsource = "builtin:arrows"\n[train]')


@pytest.fixture(scope="session")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two tasks, verified without timing, and a key."""
    folder = tmp_path_factory.mktemp("bundle")
    run = trained_run(folder, TWO_TASKS)
    done = r1export("verify", run, "--no-latency")
    assert done.returncode == 0, done.output
    assert r1export("keygen", folder / "fleet").returncode == 0
    return run
