"""train.guard through the command line: what it did is in the run's metrics and reports, and the scaled update is what is verified."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from running import RECIPE, r1export, trained_run

from r1export.update.factors import ExpertUpdate

SETTINGS = ("train.iterations=8", "train.protect=0", "train.protect_own=0", "train.distill_weight=0")
DIGITS = "tasks/01-digits"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """The same run without a limit, and with one of no loss at all."""
    folder = tmp_path_factory.mktemp("guard")
    free, guarded = folder / "free", folder / "guarded"
    for path, more in ((free, ()), (guarded, ("train.guard=0",))):
        path.mkdir()
        trained_run(path, RECIPE, *SETTINGS, *more)
    return free / "run", guarded / "run"


def test_the_factors_are_those_of_the_free_run_scaled_by_what_the_metrics_say(runs) -> None:
    free, guarded = (ExpertUpdate.read(run / DIGITS / "factors.safetensors").factors for run in runs)
    guard = json.loads((runs[1] / DIGITS / "metrics.json").read_text())["guard"]
    assert "guard" not in json.loads((runs[0] / DIGITS / "metrics.json").read_text())
    assert 0 == guard["limit"] == guard["kept"] < guard["whole"]
    assert guard["scale"] < 1
    for rows, pair in free.items():
        assert np.allclose(guarded[rows].u, pair.u * guard["scale"], rtol=1e-5, atol=1e-9)
        assert np.array_equal(guarded[rows].v, pair.v)


def test_the_run_passes_and_its_report_says_by_how_much_the_update_was_scaled(runs) -> None:
    done = r1export("verify", runs[1], "--no-latency")
    assert done.returncode == 0, done.output
    report = json.loads((runs[1] / "report.json").read_text())
    guard = json.loads((runs[1] / DIGITS / "metrics.json").read_text())["guard"]
    assert report["guards"] == {"digits": guard}
    row = f"| digits | {guard['scale']:.2f} | {guard['kept']:.2f} | {guard['whole']:.2f} | {guard['limit']:.2f} |"
    for name in ("report.md", "report.html"):
        assert "Update scaled by" in (runs[1] / name).read_text()
    assert row in " ".join((runs[1] / "report.md").read_text().split())


def test_full_fine_tuning_has_no_guard(tmp_path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    sets = ("--set", "train.guard=1.0", "--set", 'train.method="full"')
    done = r1export("train", tmp_path / "recipe.toml", "--out", tmp_path / "run", *sets)
    assert done.returncode == 2
    assert "train.guard" in done.stderr
    assert not (tmp_path / "run").exists()
