"""A task: images with labels, class names, and prompt templates."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from r1export.errors import InputError

DEFAULT_TEMPLATES = ("a photo of a {}.",)


class Picture(NamedTuple):
    """A decoded image, its location, stored (width, height) and mode, and the changes made by decoding.

    `changes` are beyond open_clip's own transform.
    """

    image: Image.Image
    location: str = ""
    size: tuple[int, int] = (0, 0)
    mode: str = "RGB"
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageSet:
    """Images that are decoded one at a time, on access.

    `labels` is int64 of shape (n,); `picture(i)` returns image i and raises `InputError` if decoding fails.
    """

    labels: np.ndarray
    picture: Callable[[int], Picture]

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def drawn(cls, labels: np.ndarray, draw: Callable[[int], Image.Image]) -> ImageSet:
        """Images that are generated in memory."""
        return cls(labels, lambda i: Picture(draw(i)))

    def read(self, i: int) -> Image.Image:
        """Image i."""
        return self.picture(i).image

    def subset(self, indices: np.ndarray) -> ImageSet:
        """The images at `indices`, in that order."""
        return ImageSet(self.labels[indices], lambda i: self.picture(int(indices[i])))


@dataclass(frozen=True)
class Task:
    """One classification task. Labels index `classes`; each template holds one `{}` for a class name."""

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    train: ImageSet
    test: ImageSet
    notes: tuple[str, ...] = ()
    """What a reader skipped."""


def few_shot(images: ImageSet, shots: int, seed: int) -> ImageSet:
    """The first `shots` images of each class in a shuffle by `seed`; 0 takes all images, a smaller class contributes all.

    Law: for one seed, the images for fewer shots are among those for more.
    """
    if shots < 0:
        raise InputError(f"shots = {shots}", "set it to the number of images per class, or 0 for all")
    if shots == 0 or not len(images):
        return images
    order = np.random.default_rng(seed).permutation(len(images))
    shuffled = images.labels[order]
    kept = [np.flatnonzero(shuffled == label)[:shots] for label in np.unique(shuffled)]
    return images.subset(order[np.sort(np.concatenate(kept))])


def readable(images: ImageSet, advance: Callable[[], None]) -> tuple[ImageSet, tuple[str, ...]]:
    """The readable images, and a line about each of the others. All are decoded, in threads; `advance` is called for each."""

    def problem(i: int) -> str:
        try:
            images.picture(i)
        except InputError as error:
            return f"skipped: {error.message}"
        return ""

    problems = []
    with ThreadPoolExecutor() as threads:
        for each in threads.map(problem, range(len(images))):
            problems.append(each)
            advance()
    kept = np.flatnonzero([not each for each in problems])
    return images.subset(kept), tuple(filter(None, problems))


def held_out(count: int, seed: int) -> set[int]:
    """A fifth of `count` images, at least one of two, for the test.

    Each class is split by the same seed on its own, so a further class does not change the split of the others.
    """
    size = max(count // 5, min(1, count - 1), 0)
    return set(np.random.default_rng(seed).permutation(count)[:size].tolist())


def check_task(task: Task, location: str, *, test_only: bool = False) -> None:
    """Raise InputError for a task that can't be trained and tested. With `test_only` it needs no training images and may repeat
    a class name (as ImageNet's lists do): images of either class are then correct with that name.

    Raises:
        InputError: fewer than two classes, two of one name that are trained, a class without training images, no test images,
            a label outside the classes, or a template without exactly one `{}`; the message begins with `location`.
    """
    _check_classes(task.classes, location)
    if not test_only:
        _check_distinct(task.classes, location)
    _check_templates(task.templates, location)
    check_labels(task, location)
    if not len(task.test):
        raise InputError(f"{location}: no test images", "add test images")
    if not test_only:
        _check_train(task, location)


def check_labels(task: Task, location: str) -> None:
    """Raises InputError, which begins with `location`, for a label outside of the classes."""
    for split, images in (("train", task.train), ("test", task.test)):
        outside = images.labels[(images.labels < 0) | (images.labels >= len(task.classes))]
        if len(outside):
            raise InputError(
                f"{location}: label {outside[0]} in {split}, expected 0 to {len(task.classes) - 1}",
                "fix the labels or the class names",
            )


def _check_classes(classes: tuple[str, ...], location: str) -> None:
    if len(classes) < 2:
        raise InputError(
            f"{location}: {len(classes)} class(es), expected two or more",
            "add classes",
        )
    if not all(name.strip() for name in classes):
        raise InputError(
            f"{location}: class {[name.strip() for name in classes].index('')} has an empty name",
            "give the class a name",
        )


def _check_distinct(classes: tuple[str, ...], location: str) -> None:
    if len(set(classes)) < len(classes):
        duplicate = next(name for name in classes if classes.count(name) > 1)
        raise InputError(f"{location}: two classes are named {duplicate!r}", "rename one of them")


def _check_templates(templates: tuple[str, ...], location: str) -> None:
    if not templates:
        raise InputError(f"{location}: no templates", f"add at least one, e.g. {DEFAULT_TEMPLATES[0]!r}")
    for template in templates:
        before, hole, after = template.partition("{}")
        if not hole or set("{}") & set(before + after):
            raise InputError(
                f"{location}: template {template!r}",
                "use exactly one {} for the class name, and no other braces",
            )


def _check_train(task: Task, location: str) -> None:
    if not len(task.train):
        raise InputError(
            f"{location}: no training images", "add training images, or use the task as a probe, which is only tested"
        )
    empty = np.flatnonzero(np.bincount(task.train.labels, minlength=len(task.classes)) == 0)
    if len(empty):
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise InputError(
            f"{location}: class {task.classes[empty[0]]!r} has no training images{more}",
            "add images, or remove the class",
        )
