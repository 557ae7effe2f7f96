"""The switches of the released code through the command line: all experts of earlier pools, and random crops."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from running import RECIPE, r1export

SETTINGS = (
    "train.iterations=3", "train.consolidate=1.0", "train.distill_weight=0", "data.shots=2", "data.test_limit=20",
)  # fmt: skip
SECOND = '[[tasks]]\nname = "arrows"\nsource = "builtin:arrows"\n'
RELEASED = ("pool.past=pool", "data.augment=crop")


def train(folder: Path, name: str, *sets: str, resume: bool = False) -> dict[str, bytes]:
    """The factors of both tasks."""
    asked = [part for setting in (*SETTINGS, *sets) for part in ("--set", setting)]
    done = r1export("train", folder / "recipe.toml", "--out", folder / name, *asked, *(("--resume",) if resume else ()))
    assert done.returncode == 0, done.output
    return {path.parent.name: path.read_bytes() for path in sorted(folder.glob(f"{name}/tasks/*/factors.safetensors"))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("released")
    (folder / "recipe.toml").write_text(RECIPE + SECOND)
    return folder


def test_only_later_tasks_see_the_pools_of_earlier_ones(folder) -> None:
    merged, pools = train(folder, "merged"), train(folder, "pools", "pool.past=pool")
    assert merged["01-digits"] == pools["01-digits"]
    assert merged["02-arrows"] != pools["02-arrows"]


def test_a_task_that_is_trained_again_with_the_released_settings_has_the_same_factors(folder) -> None:
    before = train(folder, "released", *RELEASED)
    assert before["01-digits"] != train(folder, "uncropped", "pool.past=pool")["01-digits"]
    shutil.rmtree(folder / "released/tasks/02-arrows")
    assert train(folder, "released", *RELEASED, resume=True) == before
