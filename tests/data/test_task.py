"""A task that cannot be learned and measured is refused with the place and the remedy; few-shot sets are nested and repeatable."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from r1export.data.task import ImageSet, Task, check_task, few_shot
from r1export.errors import InputError


def numbered(labels) -> ImageSet:
    """Image i has the grey level i, so that a test can see which image it got."""
    return ImageSet.drawn(np.asarray(labels, np.int64), lambda i: Image.new("RGB", (1, 1), (i, i, i)))


def numbers(images: ImageSet) -> list[int]:
    return [images.read(i).getpixel((0, 0))[0] for i in range(len(images))]


TASK = Task("pets", ("cat", "dog"), ("a photo of a {}.",), train=numbered([0, 1, 1]), test=numbered([1]))


def test_a_sound_task_passes():
    check_task(TASK, "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ("cat",), "train": numbered([0]), "test": numbered([0])}, r"1 class\(es\)"),
        ({"classes": ("cat", "cat")}, "two classes are named 'cat'"),
        ({"classes": ("cat", " ")}, "class 1 has an empty name"),
        ({"classes": ("cat", "dog", "emu", "fox")}, r"class 'emu' has no training images \(and 1 more\)"),
        ({"train": numbered([])}, "no training images"),
        ({"test": numbered([])}, "no test images"),
        ({"train": numbered([0, 1, 2])}, "label 2 in train, expected 0 to 1"),
        ({"test": numbered([-1])}, "label -1 in test"),
        ({"templates": ()}, "no templates"),
        ({"templates": ("a photo.",)}, "a photo."),
        ({"templates": ("a {} beside a {}.",)}, "exactly one"),
        ({"templates": ("a {0} photo of {}.",)}, "exactly one"),
    ],
)
def test_a_task_that_cannot_be_learned_is_refused(change, message):
    with pytest.raises(InputError, match=message) as refused:
        check_task(replace(TASK, **change), "data/pets")
    assert refused.value.message.startswith("data/pets: ")
    assert refused.value.remedy


def test_a_probe_needs_no_training_images_but_its_test_labels_are_checked():
    probe = replace(TASK, train=numbered([]))
    check_task(probe, "here", test_only=True)
    check_task(
        replace(probe, classes=("cat", "cat")), "here", test_only=True
    )  # ImageNet's lists name two classes "missile"
    with pytest.raises(InputError, match="label 7 in test"):
        check_task(replace(probe, test=numbered([7])), "here", test_only=True)


def test_few_shot_takes_so_many_of_each_class_and_all_of_a_small_one():
    images = few_shot(numbered([0] * 10 + [1] * 2 + [2] * 10), shots=4, seed=1)
    assert np.bincount(images.labels).tolist() == [4, 2, 4]


def test_few_shot_keeps_each_image_with_its_label():
    labels = np.arange(30) % 3
    images = few_shot(numbered(labels), shots=5, seed=3)
    assert labels[numbers(images)].tolist() == images.labels.tolist()


def test_the_seed_decides_the_few_shot_images():
    images = numbered([0, 1] * 50)
    first = numbers(few_shot(images, 5, seed=42))
    assert numbers(few_shot(images, 5, seed=42)) == first
    assert numbers(few_shot(images, 5, seed=43)) != first
    assert first != sorted(first), "shuffled, so that a further cut keeps all classes"


def test_zero_shots_take_every_image():
    assert numbers(few_shot(numbered([0, 1, 1]), 0, seed=1)) == [0, 1, 2]


def test_a_negative_number_of_shots_is_refused():
    with pytest.raises(InputError, match="shots = -1"):
        few_shot(TASK.train, -1, seed=1)


@given(labels=st.lists(st.integers(0, 4), max_size=40), seed=st.integers(0, 2**32 - 1), shots=st.integers(1, 9))
def test_images_for_fewer_shots_are_among_those_for_more(labels, seed, shots):
    images = numbered(labels)
    fewer, more = (numbers(few_shot(images, n, seed)) for n in (shots, shots + 1))
    assert len(set(more)) == len(more)
    assert set(fewer) <= set(more)


def test_a_subset_of_a_subset_reads_the_right_images():
    images = numbered(range(10)).subset(np.array([9, 4, 6])).subset(np.array([2, 0]))
    assert numbers(images) == images.labels.tolist() == [6, 9]
