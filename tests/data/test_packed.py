"""The photographs that come with r1export."""

from pathlib import Path

import numpy as np
import pytest

from r1export.data import packed
from r1export.data.packed import FOLDER, PACKS
from r1export.data.synthetic import load_builtin

NOTICE = Path(__file__).parents[2] / "NOTICE"


@pytest.mark.parametrize("name", PACKS)
def test_a_pack_holds_photographs_of_128_pixels_of_every_class(name: str) -> None:
    task = load_builtin(name)
    assert task.test.read(0).size == (128, 128)
    assert (np.bincount(task.test.labels, minlength=len(task.classes)) >= 10).all()


@pytest.mark.parametrize("name", ["trash6", "clothing10", "signdigits"])
def test_a_task_has_at_least_60_photographs_to_learn_each_class_from(name: str) -> None:
    task = load_builtin(name)
    assert (np.bincount(task.train.labels) >= 60).all()


@pytest.mark.parametrize("name", ["trash6", "clothing10", "signdigits"])
def test_no_photograph_is_trained_on_and_tested(name: str) -> None:
    task = load_builtin(name)
    train, test = ({images.read(i).tobytes() for i in range(len(images))} for images in (task.train, task.test))
    assert not train & test


def test_all_packs_together_are_small() -> None:
    assert sum((FOLDER / f"{name}.npz").stat().st_size for name in PACKS) < 8e6


@pytest.mark.parametrize(
    "file", [*(f"{name}.npz" for name in PACKS), "photo-lite0-128.safetensors", "photo-vit-128.safetensors"]
)
def test_the_source_and_licence_of_every_file_stand_in_the_notice(file: str) -> None:
    assert f"{Path(packed.__file__).parent.name}/builtin/{file}" in NOTICE.read_text(encoding="utf-8")
