"""Images in folders by class, with a given split and with our own."""

import os

import numpy as np
import pytest
from pictures import dotted

from r1export.data.folder import read, read_folder
from r1export.data.request import Request
from r1export.errors import InputError


def put(folder, *names: str, shade: int = 0) -> None:
    """Small images; the n-th has the red level `shade + n`."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, name in enumerate(names):
        dotted((shade + n, 0, 0)).save(folder / name)


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


def test_what_is_no_picture_or_hidden_is_left_out_and_noted(flat):
    (flat / "ant" / "notes.txt").write_text("x")
    (flat / "ant" / "._01.png").write_bytes(b"x")
    put(flat / ".cache", "1.png")
    put(flat, "stray.png")
    task = read_folder(flat, seed=42)
    assert task.classes == ("ant", "bee")
    assert len(task.train) + len(task.test) == 40
    assert sorted(task.notes) == [
        "skipped (hidden entry): .cache, ant/._01.png",
        "skipped (image outside of a class folder): stray.png",
        "skipped (not an image): ant/notes.txt",
    ]


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".JPG", ".apng", ".avif", ".mpo", ".pgm"])
def test_suffixes_of_the_promised_formats_are_read(tmp_path, suffix):
    put(tmp_path / "ant", "1.png", "2.png")
    put(tmp_path / "bee", "1.png")
    (tmp_path / "ant" / "2.png").rename(tmp_path / "ant" / f"2{suffix}")
    task = read_folder(tmp_path, seed=42, test_only=True)
    assert (len(task.test), task.notes) == (3, ())


@pytest.mark.parametrize("suffix", [".heic", ".HEIF", ".jp2", ".svg", ".dng"])
def test_a_picture_in_a_format_that_is_not_read_is_refused_or_left_out_by_name(tmp_path, suffix):
    put(tmp_path / "ant", "1.png")
    put(tmp_path / "bee", "1.png")
    (tmp_path / "bee" / f"photo{suffix}").write_bytes(b"x")
    with pytest.raises(InputError, match=rf"bee/photo{suffix}: unsupported image format .*skip_broken"):
        read_folder(tmp_path, seed=42, test_only=True)
    request = Request(f"folder:{tmp_path}", test_only=True, skip_broken=True)
    assert read(request).notes == (f"skipped (unsupported image format): bee/photo{suffix}",)


def test_pictures_in_sub_folders_belong_to_the_class(flat):
    put(flat / "ant" / "2024" / "june", "1.png", "2.png")
    assert np.bincount(read_folder(flat, seed=42, test_only=True).test.labels).tolist() == [22, 20]


@pytest.mark.parametrize(
    ("train", "test"), [("Train", "TEST"), ("TRAIN", "val"), ("train", "Validation"), ("train", "valid")]
)
def test_splits_are_known_in_any_case_and_by_their_other_names(given, train, test):
    (given / "train").rename(given / train)
    (given / "test").rename(given / test)
    task = read_folder(given, seed=42)
    assert (reds(task.train), reds(task.test)) == ([10, 20, 21], [30, 40])


def test_a_second_test_split_is_left_out_and_noted(given):
    put(given / "val" / "a_cat", "1.png")
    put(given / "extra" / "a_cat", "1.png")
    assert read_folder(given, seed=42).notes == ("skipped (folder outside of the splits): extra, val",)


def test_two_folders_of_one_split_are_refused(given):
    put(given / "Train" / "a_cat", "1.png")
    if not (given / "train").samefile(given / "Train"):
        with pytest.raises(InputError, match=r"both (Train|train)/ and (Train|train)/"):
            read_folder(given, seed=42)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("classes.json", '{"ant": "fire ant", "bee": "honey_bee", "cow": "cow"}'),
        ("classes.txt", "\ufeffant fire ant\r\n\r\nbee\thoney_bee\ncow cow\n"),
    ],
)
def test_names_of_classes_may_stand_beside_the_folders(flat, file, content):
    (flat / file).write_text(content, encoding="utf-8")
    task = read_folder(flat, seed=42)
    assert task.classes == ("fire ant", "honey_bee")
    assert task.notes == ("skipped (class name without a folder): cow",)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("classes.json", b'{"ant": "fire ant"}', "no class name for the folder bee"),
        ("classes.json", b'{"ant": 3, "bee": "x"}', "ant: found 3"),
        ("classes.json", b"[1]", "expected an object"),
        ("classes.json", b'{"ant": "a", "ant": "b"}', "duplicate key"),
        ("classes.txt", b"ant\nbee bee\n", "'ant' has no class name"),
        ("classes.txt", b"ant a\nant b\nbee c\n", "names a folder twice"),
        ("classes.txt", b"ant \xff\n", "not UTF-8"),
    ],
)
def test_names_that_do_not_fit_the_folders_are_refused(flat, file, content, message):
    (flat / file).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_folder(flat, seed=42)


def test_a_folder_whose_name_is_no_unicode_is_refused(flat):
    os.mkdir(os.fsencode(flat) + b"/caf\xe9")
    with pytest.raises(InputError, match=r"caf.*xe9.*not UTF-8.*rename"):
        read_folder(flat, seed=42)


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
    with pytest.raises(InputError, match="no class folders"):
        read_folder(tmp_path, seed=42)
