"""A task from two photographs of scikit-learn, cut into pieces: classify which photograph a piece is from.

Training pieces come from the left of each photograph, test pieces from the right, so that they don't overlap.
"""

from __future__ import annotations

from functools import cache, partial

import numpy as np
from PIL import Image

from r1export.data.task import ImageSet, Task

NAMES = {
    "temple": "china.jpg",
    "flower": "flower.jpg",
}  # (427, 640, 3) each, CC BY, see scikit-learn's images/README.txt
SIDE = 128  # pixels of a piece
CUT = 400  # column between training and test pieces
COUNTS = {"train": 200, "test": 200}


@cache
def _photo(name: str) -> np.ndarray:
    from sklearn.datasets import load_sample_image  # imported here: it takes a second

    photo: np.ndarray = load_sample_image(NAMES[name])
    return photo


def _piece(split: str, index: int) -> Image.Image:
    """Piece `index` of a split: a pure function of both; the classes take turns."""
    photo = _photo(list(NAMES)[index % len(NAMES)])
    half = photo[:, :CUT] if split == "train" else photo[:, CUT:]
    rng = np.random.default_rng([index, len(split)])
    top, left = rng.integers(half.shape[0] - SIDE), rng.integers(half.shape[1] - SIDE)
    return Image.fromarray(half[top : top + SIDE, left : left + SIDE])


def load_photos() -> Task:
    """The task `builtin:photos`."""
    sets = {
        split: ImageSet.drawn(np.arange(count) % len(NAMES), partial(_piece, split)) for split, count in COUNTS.items()
    }
    return Task("photos", tuple(NAMES), ("a photo of a {}.",), sets["train"], sets["test"])
