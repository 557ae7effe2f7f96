"""Decoded images: cropped to uint8 once, kept in memory if they fit, decoded again if not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from r1export.adapt.clip import Preprocess
from r1export.data.task import ImageSet

BUDGET = 2 << 30  # bytes of decoded images kept per set: the largest few-shot task of MTIL takes 0.3 GB at 224 px
THREADS = max(1, os.cpu_count() or 1)  # PIL decodes and resizes outside the interpreter lock


class Pixels:
    """The images of a set as uint8 batches. Memory is touched only for images that were asked for.

    `changes` are those that decoding made to each image (see `Picture`), by its index, for the images decoded so far.
    """

    def __init__(self, images: ImageSet, preprocess: Preprocess, *, budget: int = BUDGET) -> None:
        self.images, self.preprocess = images, preprocess
        shape = (len(images), 3, *preprocess.size)
        keep = int(np.prod(shape, dtype=np.int64)) <= budget
        self._kept = np.empty(shape, np.uint8) if keep else None
        self._done = np.zeros(len(images), bool)
        self.changes: dict[int, tuple[str, ...]] = {}

    @property
    def kept(self) -> bool:
        """Whether images stay in memory once they are decoded."""
        return self._kept is not None

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: np.ndarray) -> Tensor:
        """uint8 (n, 3, h, w). Raises InputError naming an image that cannot be decoded."""
        if self._kept is None:
            return torch.from_numpy(np.stack(self._decode(indices)))
        missing = np.unique(indices[~self._done[indices]])
        for i, crop in zip(missing, self._decode(missing), strict=True):
            self._kept[i] = crop
        self._done[missing] = True
        return torch.from_numpy(self._kept[indices])

    def batches(self, size: int) -> Iterator[Tensor]:
        """All images in order."""
        for start in range(0, len(self), size):
            yield self.batch(np.arange(start, min(start + size, len(self))))

    def _decode(self, indices: np.ndarray) -> list[np.ndarray]:
        with ThreadPoolExecutor(THREADS) as threads:
            return list(threads.map(self._crop, indices.tolist()))

    def _crop(self, i: int) -> np.ndarray:
        picture = self.images.picture(i)
        self.changes[i] = picture.changes
        return self.preprocess.crop(picture.image)
