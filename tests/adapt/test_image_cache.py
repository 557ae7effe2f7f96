"""Decoded images."""

import numpy as np
import pytest

from r1export.adapt.image_cache import Pixels
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
