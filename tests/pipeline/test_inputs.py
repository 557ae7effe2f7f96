"""What people bring, through the real command line: what is changed or left out is said, what would be taught wrong is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from running import RECIPE, Result, r1export

SETTINGS = ("train.iterations=2", "train.batch_size=2", "train.distill_weight=0")


def noise(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 20, 3), np.uint8))


@pytest.fixture
def pets(tmp_path) -> Path:
    """Two classes, three pictures to train on and two to test."""
    for n, (split, name) in enumerate((split, name) for split in ("train", "test") for name in ("cat", "dog")):
        (tmp_path / "pets" / split / name).mkdir(parents=True)
        for i in range(3 if split == "train" else 2):
            noise(10 * n + i).save(tmp_path / "pets" / split / name / f"{i}.png")
    return tmp_path / "pets"


def train(pets: Path, *settings: str) -> Result:
    recipe = pets.parent / "recipe.toml"
    recipe.write_text(RECIPE.replace("builtin:digits", f"folder:{pets}").replace('"digits"', '"pets"'))
    sets = [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]
    return r1export("train", recipe, "--out", pets.parent / "run", *sets)


def inputs(pets: Path) -> dict:
    return json.loads((pets.parent / "run" / "inputs.json").read_text())["tasks"][0]


def test_what_decoding_changes_is_counted_and_said(pets) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    noise(1).save(pets / "train/cat/0.png", exif=exif)
    noise(2).convert("RGBA").save(pets / "test/dog/0.png")
    (pets / "train/dog/.DS_Store").write_bytes(b"x")
    result = train(pets)
    assert result.returncode == 0, result.output
    assert inputs(pets) == {
        "task": "pets",
        "images": 10,
        "decoded": 10,
        "changes": {"transparency composited": 1, "rotated by EXIF orientation": 1},
        "notes": ["skipped (hidden entry): train/dog/.DS_Store"],
    }
    assert "pets: 1 image: rotated by EXIF orientation" in result.stdout
    assert "pets: skipped (hidden entry): train/dog/.DS_Store" in result.stdout


def test_open_clips_decoding_changes_nothing(pets) -> None:
    noise(2).convert("RGBA").save(pets / "test/dog/0.png")
    assert train(pets, "data.decode=open_clip").returncode == 0
    assert inputs(pets)["changes"] == {}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "cannot decode the image"),
    "a single value": (lambda path: Image.new("RGB", (9, 9), 5).save(path), "every pixel has the same value"),
    "no picture": (lambda path: path.write_text("x"), "not an image in a supported format"),
    "an unpromised format": (lambda path: noise().save(path, "ICO"), "not an image in a supported format"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_picture_is_named_or_left_out_where_the_recipe_says_so(pets, kind: str) -> None:
    breaks, message = BROKEN[kind]
    breaks(pets / "train/cat/1.png")
    result = train(pets)
    assert result.returncode == 2, result.output
    assert f"{pets}/train/cat/1.png: {message}" in result.stderr
    assert "data.skip_broken = true" in result.stderr
    assert not (pets.parent / "run").exists()
    assert train(pets, "data.skip_broken=true").returncode == 0
    found = inputs(pets)
    assert found["images"] == 9
    assert [note.startswith(f"skipped: {pets}/train/cat/1.png: {message}") for note in found["notes"]] == [True]


def test_a_class_whose_pictures_are_all_broken_is_refused(pets) -> None:
    for path in (pets / "train/cat").iterdir():
        truncate(path)
    result = train(pets, "data.skip_broken=true")
    assert result.returncode == 2
    assert "class 'cat' has no training images" in result.stderr


def test_classes_with_the_same_tokens_are_refused_before_training(pets) -> None:
    for split in ("train", "test"):
        (pets / split / "dog").rename(pets / split / "Cat")
    result = train(pets)
    assert result.returncode == 2
    assert "'Cat' and 'cat' are the same for the text tower" in result.stderr
    assert not (pets.parent / "run").exists()


def test_inspect_describes_the_pictures_of_a_task_and_writes_a_contact_sheet(pets) -> None:
    truncate(pets / "train/cat/1.png")
    (pets / "test/dog/photo.heic").write_bytes(b"x")
    sheet = pets.parent / "sheet.html"
    result = r1export("inspect", f"folder:{pets}", "--out", sheet, "--json")
    assert result.returncode == 0, result.output
    found = json.loads(result.stdout)
    assert (found["kind"], found["refused"], len(found["rows"])) == ("Pictures", 1, 2)
    assert found["notes"][0] == "skipped (unsupported image format): test/dog/photo.heic"
    assert sheet.read_text().count("<figure>") == 9


def test_a_contact_sheet_of_something_else_is_refused(pets) -> None:
    result = r1export("inspect", pets, "--out", pets / "sheet.html")
    assert result.returncode == 2
    assert "is not a task source (use a source such as folder:DIR)" in result.stderr
