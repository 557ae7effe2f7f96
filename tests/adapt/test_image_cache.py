"""Decoded images."""

import numpy as np
import pytest
from PIL import Image

from r1export.adapt.image_cache import Pixels, RandomCrop
from r1export.data.task import ImageSet
from r1export.errors import InputError


def counting(stripes, reads: list[int]) -> ImageSet:
    def read(i: int):
        reads.append(i)
        return stripes.train.read(i)

    return ImageSet.drawn(stripes.train.labels, read)


def test_an_image_that_is_kept_is_decoded_once(tiny_clip, stripes) -> None:
    reads: list[int] = []
    pixels = Pixels(counting(stripes, reads), tiny_clip.preprocess)
    first, again = pixels.batch(np.array([3, 1, 3])), pixels.batch(np.array([1, 2]))
    assert sorted(reads) == [1, 2, 3]
    assert first.dtype.is_floating_point is False
    assert np.array_equal(first[1], again[0])
    assert np.array_equal(first[0], first[2])


def test_what_does_not_fit_is_decoded_again_with_the_same_result(tiny_clip, stripes) -> None:
    reads: list[int] = []
    small = Pixels(counting(stripes, reads), tiny_clip.preprocess, budget=10)
    for _ in range(2):
        assert np.array_equal(
            small.batch(np.array([5])), Pixels(stripes.train, tiny_clip.preprocess).batch(np.array([5]))
        )
    assert reads == [5, 5]


def test_batches_cover_all_images_in_order(tiny_clip, stripes) -> None:
    pixels = Pixels(stripes.train, tiny_clip.preprocess)
    parts = list(pixels.batches(7))
    assert [len(part) for part in parts] == [7, 7, 7, 3]
    assert np.array_equal(np.concatenate(parts), pixels.batch(np.arange(24)))


def test_an_image_that_cannot_be_decoded_is_named(tiny_clip) -> None:
    def read(i: int):
        raise InputError(f"photo {i}.jpg cannot be decoded", "remove it")

    with pytest.raises(InputError, match=r"photo 4\.jpg"):
        Pixels(ImageSet.drawn(np.zeros(9, np.int64), read), tiny_clip.preprocess).batch(np.array([4]))


def noisy(size: tuple[int, int]) -> ImageSet:
    """Four images without two equal rows or columns, so that a crop shows."""
    width, height = size
    pictures = np.random.default_rng(0).integers(0, 256, (4, height, width, 3), np.uint8)
    return ImageSet.drawn(np.zeros(4, np.int64), lambda i: Image.fromarray(pictures[i]))


def test_a_random_crop_is_drawn_once_for_each_image(tiny_clip) -> None:
    pixels = Pixels(noisy((64, 48)), tiny_clip.preprocess, augment=RandomCrop(seed=1))
    again = Pixels(noisy((64, 48)), tiny_clip.preprocess, augment=RandomCrop(seed=1))
    every = np.arange(4)
    assert np.array_equal(pixels.batch(every, visit=1), pixels.batch(every, visit=2))
    assert np.array_equal(pixels.batch(every), again.batch(every, visit=7))
    assert not np.array_equal(pixels.batch(every), Pixels(noisy((64, 48)), tiny_clip.preprocess).batch(every))


def test_a_random_crop_can_be_drawn_anew_at_every_visit(tiny_clip) -> None:
    pixels = Pixels(noisy((64, 48)), tiny_clip.preprocess, augment=RandomCrop(seed=1, anew=True))
    first, second = (pixels.batch(np.array([2]), visit=visit) for visit in (1, 2))
    assert not pixels.kept
    assert not np.array_equal(first, second)
    assert np.array_equal(first, pixels.batch(np.array([2]), visit=1))


def test_random_crops_hold_nine_tenths_of_the_image_or_all_of_it() -> None:
    crop, boxes = RandomCrop(seed=3, anew=True), []
    for visit in range(200):
        left, top, right, bottom = crop.box(200, 180, image=0, visit=visit)
        assert 0 <= left < right <= 200
        assert 0 <= top < bottom <= 180
        boxes.append((right - left) * (bottom - top) / (200 * 180))
    assert 0.89 < min(boxes) < 0.92
    assert max(boxes) <= 1
    assert crop.box(1000, 10, image=0) == (0, 0, 1000, 10)  # no crop of that aspect fits


def test_random_crops_can_be_smaller() -> None:
    crop = RandomCrop(seed=3, anew=True, area=(0.1, 0.3))
    boxes = [crop.box(200, 180, image=0, visit=visit) for visit in range(200)]
    areas = [(right - left) * (bottom - top) / (200 * 180) for left, top, right, bottom in boxes]
    assert 0.09 < min(areas) < 0.12
    assert 0.28 < max(areas) < 0.31
