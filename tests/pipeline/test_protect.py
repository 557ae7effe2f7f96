"""train.protect through the command line: what is shipped reads nothing of earlier inputs, and a resumed run is the same run."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from running import RECIPE, r1export

from r1export.update.container import read_tensors
from r1export.update.factors import ExpertUpdate

SETTINGS = (
    "train.iterations=3", "train.protect=0.8", "train.protect_own=0.5", "train.distill_weight=0", "data.shots=2", "data.test_limit=20",
)  # fmt: skip
SECOND = '[[tasks]]\nname = "arrows"\nsource = "builtin:arrows"\n'


def train(folder: Path, *more: str) -> None:
    sets = [part for setting in SETTINGS for part in ("--set", setting)]
    done = r1export("train", folder / "recipe.toml", "--out", folder / "run", *sets, *more)
    assert done.returncode == 0, done.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("protect")
    (folder / "recipe.toml").write_text(RECIPE + SECOND)
    train(folder)
    return folder


def test_the_factors_of_a_task_read_nothing_of_what_the_task_before_it_spans(folder) -> None:
    directions = read_tensors(folder / "run/tasks/01-digits/directions.safetensors")
    factors = ExpertUpdate.read(folder / "run/tasks/02-arrows/factors.safetensors").factors
    for rows, pair in factors.items():
        span = directions[f"{rows}.directions"]
        assert span.shape[1] > 0
        assert np.abs(pair.v @ span).max() < 1e-6 < np.abs(pair.v).max()


def test_a_task_that_is_trained_again_has_the_same_factors_and_directions(folder) -> None:
    task = folder / "run/tasks/02-arrows"
    before = {path.name: path.read_bytes() for path in task.glob("*.safetensors")}
    assert set(before) == {"factors.safetensors", "pool.safetensors", "directions.safetensors"}
    shutil.rmtree(task)
    train(folder, "--resume")
    assert {path.name: path.read_bytes() for path in task.glob("*.safetensors")} == before


def test_directions_that_are_gone_are_named(folder, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/run/tasks/02-arrows")
    gone = tmp_path / "copy/run/tasks/01-digits/directions.safetensors"
    gone.unlink()
    sets = [part for setting in SETTINGS for part in ("--set", setting)]
    done = r1export("train", tmp_path / "copy/recipe.toml", "--out", tmp_path / "copy/run", *sets, "--resume")
    assert done.returncode == 2
    assert str(gone) in done.stderr


def test_experts_start_along_the_gradient_unless_the_recipe_says_at_random(folder, tmp_path) -> None:
    shutil.copy(folder / "recipe.toml", tmp_path)
    train(tmp_path, "--set", "pool.init=random", "--set", "train.protect_own=0", "--set", "train.iterations=1")
    train(folder, "--out", tmp_path / "along", "--set", "train.protect_own=0", "--set", "train.iterations=1")
    random, along = (
        read_tensors(run / "tasks/01-digits/pool.safetensors") for run in (tmp_path / "run", tmp_path / "along")
    )
    name = next(name for name in along if name.endswith("lora_A"))
    leading, drawn = (tensors[name][:2] for tensors in (along, random))
    assert abs(leading[0] @ leading[1]) < 0.05 * leading[0] @ leading[0]
    assert not np.allclose(leading, drawn, atol=0.1)
