"""A survey of all images of a task: sizes, modes, changes made by decoding, unreadable images, and duplicates."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from r1export.data.task import ImageSet, Task, check_labels
from r1export.errors import InputError

THUMBNAILS = 12  # images per class on a contact sheet
SIDE = 96  # pixels of the longer side of a thumbnail
Advance = Callable[[], None]


@dataclass(frozen=True)
class Thumbnail:
    """A small copy of a decoded image, its location, and the changes made by decoding."""

    image: Image.Image
    location: str
    changes: tuple[str, ...]


@dataclass(frozen=True)
class ClassSurvey:
    """The images of one class. `sizes` are (width, height) of the smallest and the largest; None if none is readable."""

    name: str
    train: int
    test: int
    sizes: tuple[tuple[int, int], tuple[int, int]] | None
    modes: Mapping[str, int]
    changes: Mapping[str, int]
    refused: tuple[str, ...]
    thumbnails: tuple[Thumbnail, ...]


@dataclass(frozen=True)
class Survey:
    """The survey of a task. `twins` are locations of identical images in train and test: (train, test)."""

    task: str
    classes: tuple[ClassSurvey, ...]
    twins: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    @property
    def refused(self) -> int:
        return sum(len(each.refused) for each in self.classes)


@dataclass(frozen=True)
class _Look:
    """One image: its class and split, and either its properties or the reason why it is unreadable."""

    label: int
    split: str
    refused: str = ""
    location: str = ""
    size: tuple[int, int] = (0, 0)
    mode: str = ""
    changes: tuple[str, ...] = ()
    pixels: bytes = b""
    thumbnail: Image.Image | None = None


def survey(task: Task, advance: Advance = lambda: None) -> Survey:
    """Decode every image of `task` once, in threads; `advance` is called for each. Only a few thumbnails per class are kept.

    Raises InputError for a label outside of the classes.
    """
    check_labels(task, task.name)
    looks = [*_looks(task.train, "train", advance), *_looks(task.test, "test", advance)]
    by_class: list[list[_Look]] = [[] for _ in task.classes]
    for look in looks:
        by_class[look.label].append(look)
    classes = (_of_class(name, own) for name, own in zip(task.classes, by_class, strict=True))
    return Survey(task.name, tuple(classes), tuple(_twins(looks)), task.notes)


def _looks(images: ImageSet, split: str, advance: Advance) -> Iterator[_Look]:
    firsts = [np.flatnonzero(images.labels == label)[:THUMBNAILS] for label in np.unique(images.labels)]
    shown = {int(i) for indices in firsts for i in indices}

    def look(i: int) -> _Look:
        label = int(images.labels[i])
        try:
            picture = images.picture(i)
        except InputError as error:
            return _Look(label, split, refused=error.message)
        small = picture.image.convert("RGB")
        digest = hashlib.sha256(f"{small.size}".encode() + small.tobytes()).digest()
        small.thumbnail((SIDE, SIDE))
        thumbnail = small if i in shown else None
        size = picture.size if picture.location else picture.image.size
        return _Look(
            label, split, "", picture.location or f"image {i}", size, picture.mode, picture.changes, digest, thumbnail
        )

    with ThreadPoolExecutor() as threads:
        for found in threads.map(look, range(len(images))):
            advance()
            yield found


def _of_class(name: str, looks: list[_Look]) -> ClassSurvey:
    sound = sorted((look for look in looks if not look.refused), key=lambda look: look.size[0] * look.size[1])
    first = [look for look in looks if look.thumbnail][:THUMBNAILS]
    return ClassSurvey(
        name,
        train=sum(look.split == "train" for look in looks),
        test=sum(look.split == "test" for look in looks),
        sizes=(sound[0].size, sound[-1].size) if sound else None,
        modes=Counter(look.mode for look in sound),
        changes=Counter(change for look in sound for change in look.changes),
        refused=tuple(look.refused for look in looks if look.refused),
        thumbnails=tuple(Thumbnail(look.thumbnail, look.location, look.changes) for look in first if look.thumbnail),
    )


def _twins(looks: list[_Look]) -> Iterator[tuple[str, str]]:
    """Test images with the same pixels as a training image, whatever their file names."""
    trained = {look.pixels: look.location for look in reversed(looks) if look.split == "train" and look.pixels}
    for look in looks:
        if look.split == "test" and look.pixels in trained:
            yield trained[look.pixels], look.location
