"""A task: images with labels, the names of their classes, and the prompts that name them to CLIP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class ImageSet:
    """Images that are decoded one at a time, when asked for.

    `labels` is int64 of shape (n,); `read(i)` returns image i as RGB and raises `InputError` if it cannot be decoded.
    """

    labels: np.ndarray
    read: Callable[[int], Image.Image]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: np.ndarray) -> ImageSet:
        """The images at `indices`, in that order."""
        return ImageSet(self.labels[indices], lambda i: self.read(int(indices[i])))


@dataclass(frozen=True)
class Task:
    """One classification task of the stream. Labels index `classes`; each template holds one `{}` for a class name."""

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    train: ImageSet
    test: ImageSet
