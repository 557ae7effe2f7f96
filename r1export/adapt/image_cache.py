"""Decoded images: cropped to uint8 once, kept in memory if they fit, decoded again if not, or cropped at random."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from r1export.adapt.clip import Preprocess
from r1export.data.task import ImageSet

BUDGET = 2 << 30  # bytes of decoded images kept per set: the largest few-shot task of MTIL takes 0.3 GB at 224 px
THREADS = max(1, os.cpu_count() or 1)  # PIL decodes and resizes outside the interpreter lock


@dataclass(frozen=True)
class RandomCrop:
    """Crops of a fraction `area` of an image with an aspect of 3:4 to 4:3, resized to what the model sees.

    Every image has one crop, or, with `anew`, a new one at every visit. The same seed, image and visit give the same crop.
    Source: RandomResizedCrop of torchvision with the scale that open_clip trains with.
    """

    seed: int
    anew: bool = False
    area: tuple[float, float] = (0.9, 1.0)

    def box(self, width: int, height: int, image: int, visit: int = 0) -> tuple[int, int, int, int]:
        """Left, top, right and bottom in pixels of an image of this size; all of it if no crop drawn in ten tries fits."""
        rng = np.random.default_rng([self.seed, image, visit if self.anew else 0])
        for _ in range(10):
            area, aspect = (
                width * height * rng.uniform(*self.area),
                math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3))),
            )
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
                return left, top, left + w, top + h
        return 0, 0, width, height


class Images(Protocol):
    """The images of a set in the form in which `Clip.encode_image` takes them: `Pixels`, or what is computed from them."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray, visit: int = 0) -> Tensor:
        """The images (n, ...) with these indices, int64 (n,)."""

    def batches(self, size: int) -> Iterator[Tensor]:
        """All images in order."""


class Pixels:
    """The images of a set as uint8 batches. Memory is touched only for images that were asked for.

    With `augment` they are cropped at random instead of as the model's clients crop them. `changes` are those that decoding
    made to each image (see `Picture`), by its index, for the images decoded so far.
    """

    def __init__(
        self, images: ImageSet, preprocess: Preprocess, *, augment: RandomCrop | None = None, budget: int = BUDGET
    ) -> None:
        self.images, self.preprocess, self.augment = images, preprocess, augment
        shape = (len(images), 3, *preprocess.size)
        keep = int(np.prod(shape, dtype=np.int64)) <= budget and not (augment and augment.anew)
        self._kept = np.empty(shape, np.uint8) if keep else None
        self._done = np.zeros(len(images), bool)
        self.changes: dict[int, tuple[str, ...]] = {}

    @property
    def kept(self) -> bool:
        """Whether images stay in memory once they are decoded."""
        return self._kept is not None

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: np.ndarray, visit: int = 0) -> Tensor:
        """uint8 (n, 3, h, w); `visit` selects the crop if there is a new one at every visit. Raises InputError naming an image that cannot be decoded."""
        if self._kept is None:
            return torch.from_numpy(np.stack(self._decode(indices, visit)))
        missing = np.unique(indices[~self._done[indices]])
        for i, crop in zip(missing, self._decode(missing, visit), strict=True):
            self._kept[i] = crop
        self._done[missing] = True
        return torch.from_numpy(self._kept[indices])

    def batches(self, size: int) -> Iterator[Tensor]:
        """All images in order."""
        for start in range(0, len(self), size):
            yield self.batch(np.arange(start, min(start + size, len(self))))

    def _decode(self, indices: np.ndarray, visit: int) -> list[np.ndarray]:
        with ThreadPoolExecutor(THREADS) as threads:
            return list(threads.map(lambda i: self._crop(i, visit), indices.tolist()))

    def _crop(self, i: int, visit: int) -> np.ndarray:
        picture = self.images.picture(i)
        self.changes[i] = picture.changes
        if self.augment is None:
            return self.preprocess.crop(picture.image)
        return self.preprocess.resized(picture.image, self.augment.box(*picture.image.size, i, visit))
