"""Images in folders by class, with a given split and with our own."""

import numpy as np
import pytest
from PIL import Image

from r1export.data.folder import read_folder
from r1export.errors import InputError


def put(folder, *names: str, shade: int = 0) -> None:
    """Small images; the n-th has the red level `shade + n`."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, name in enumerate(names):
        Image.new("RGB", (2, 2), (shade + n, 0, 0)).save(folder / name)


def reds(images) -> list[int]:
    return [images.read(i).getpixel((0, 0))[0] for i in range(len(images))]


@pytest.fixture
def given(tmp_path):
    put(tmp_path / "train" / "b_dog", "1.png", "2.png", shade=20)
    put(tmp_path / "train" / "a_cat", "1.png", shade=10)
    put(tmp_path / "test" / "a_cat", "1.png", shade=30)
    put(tmp_path / "test" / "b_dog", "1.png", shade=40)
    return tmp_path


@pytest.fixture
def flat(tmp_path):
    for label, name in enumerate(("ant", "bee")):
        put(tmp_path / name, *(f"{n:02d}.png" for n in range(20)), shade=100 * label)
    return tmp_path


def test_a_given_split_is_kept_and_classes_are_named_after_their_folders(given):
    task = read_folder(given, seed=42)
    assert task.classes == ("a cat", "b dog")
    assert (task.train.labels.tolist(), task.test.labels.tolist()) == ([0, 1, 1], [0, 1])
    assert (reds(task.train), reds(task.test)) == ([10, 20, 21], [30, 40])
    assert task.name == given.name


def test_without_a_split_a_fifth_of_each_class_is_held_out(flat):
    task = read_folder(flat, seed=42)
    assert np.bincount(task.train.labels).tolist() == [16, 16]
    assert np.bincount(task.test.labels).tolist() == [4, 4]
    assert sorted(reds(task.train) + reds(task.test)) == [*range(20), *range(100, 120)]


def test_the_seed_decides_what_is_held_out(flat):
    held_out = [reds(read_folder(flat, seed).test) for seed in range(6)]
    assert reds(read_folder(flat, 0).test) == held_out[0]
    assert len({tuple(images) for images in held_out}) > 1


def test_a_further_class_does_not_move_the_images_of_the_others(flat):
    before = reds(read_folder(flat, seed=7).test)
    put(flat / "aardvark", *(f"{n}.png" for n in range(5)), shade=200)
    assert [red for red in reds(read_folder(flat, seed=7).test) if red < 200] == before


def test_a_class_of_two_has_one_image_in_train_and_one_in_test(tmp_path):
    put(tmp_path / "ant", "1.png", "2.png")
    put(tmp_path / "bee", "1.png")
    task = read_folder(tmp_path, seed=42)
    assert (task.train.labels.tolist(), task.test.labels.tolist()) == ([0, 1], [0])


def test_a_class_may_be_called_train(tmp_path):
    put(tmp_path / "train", "1.png", "2.png")
    put(tmp_path / "bus", "1.png", "2.png")
    assert read_folder(tmp_path, seed=42).classes == ("bus", "train")


def test_a_class_without_images_is_kept_so_that_it_can_be_refused(given):
    put(given / "test" / "c_emu", "1.png")
    task = read_folder(given, seed=42)
    assert task.classes == ("a cat", "b dog", "c emu")
    assert 2 not in task.train.labels


def test_files_that_are_not_images_and_hidden_ones_are_passed_over(flat):
    (flat / "ant" / "notes.txt").write_text("x")
    (flat / "ant" / "._01.png").write_bytes(b"x")
    put(flat / ".cache", "1.png")
    task = read_folder(flat, seed=42)
    assert task.classes == ("ant", "bee")
    assert len(task.train) + len(task.test) == 40


def test_a_probe_takes_a_folder_without_a_split_as_test(flat):
    task = read_folder(flat, seed=42, test_only=True)
    assert (len(task.train), len(task.test)) == (0, 40)


@pytest.mark.parametrize(("here", "missing"), [("train", "test"), ("test", "train")])
def test_half_a_split_is_refused(tmp_path, here, missing):
    put(tmp_path / here / "ant", "1.png")
    with pytest.raises(InputError, match=f"has {here}/ but no {missing}/"):
        read_folder(tmp_path, seed=42)


def test_a_probe_needs_only_test(tmp_path):
    put(tmp_path / "test" / "ant", "1.png")
    assert len(read_folder(tmp_path, seed=42, test_only=True).test) == 1


def test_a_missing_or_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        read_folder(tmp_path / "gone", seed=42)
    with pytest.raises(InputError, match="no folders in it"):
        read_folder(tmp_path, seed=42)
