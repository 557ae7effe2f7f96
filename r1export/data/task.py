"""A task: images with labels, the names of their classes, and the prompts that name them to CLIP."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from r1export.errors import InputError

DEFAULT_TEMPLATES = ("a photo of a {}.",)

# What Pillow raises for damaged files of one format or another; it has no base error of its own.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


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


def decode(source: Path | bytes, place: str) -> Image.Image:
    """The image in a file or in its bytes, as RGB. Raises InputError that begins with `place`."""
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.convert("RGB")
    except _UNREADABLE as error:
        raise InputError(
            f"{place}: cannot be read as an image ({type(error).__name__})", "replace it or take it out"
        ) from error


def images_from_files(files: Sequence[Path], labels: Sequence[int]) -> ImageSet:
    """One image per file, decoded when it is read."""
    return ImageSet(np.asarray(labels, np.int64), lambda i: decode(files[i], str(files[i])))


def few_shot(images: ImageSet, shots: int, seed: int) -> ImageSet:
    """The first `shots` images of each class in a shuffle by `seed`; 0 takes all images, a smaller class gives all it has.

    Law: for one seed, the images for fewer shots are among those for more.
    """
    if shots < 0:
        raise InputError(f"shots = {shots}", "give the images per class, or 0 for all")
    if shots == 0 or not len(images):
        return images
    order = np.random.default_rng(seed).permutation(len(images))
    shuffled = images.labels[order]
    kept = [np.flatnonzero(shuffled == label)[:shots] for label in np.unique(shuffled)]
    return images.subset(order[np.sort(np.concatenate(kept))])


def check_task(task: Task, place: str, *, test_only: bool = False) -> None:
    """Refuse a task that cannot be learned and measured. `test_only` does without training images.

    Raises:
        InputError: fewer than two classes, two of one name, a class without training images, no test images,
            a label outside the classes, or a template without exactly one `{}`; the message begins with `place`.
    """
    _check_classes(task.classes, place)
    _check_templates(task.templates, place)
    for split, images in (("train", task.train), ("test", task.test)):
        outside = images.labels[(images.labels < 0) | (images.labels >= len(task.classes))]
        if len(outside):
            raise InputError(
                f"{place}: label {outside[0]} in {split}, expected 0 to {len(task.classes) - 1}",
                "mend the labels or the class names",
            )
    if not len(task.test):
        raise InputError(f"{place}: no test images", "add some: without them nothing can be measured")
    if not test_only:
        _check_train(task, place)


def _check_classes(classes: tuple[str, ...], place: str) -> None:
    if len(classes) < 2:
        raise InputError(
            f"{place}: {len(classes)} class(es), expected two or more",
            "a classification task needs something to tell apart",
        )
    if not all(name.strip() for name in classes):
        raise InputError(
            f"{place}: class {[name.strip() for name in classes].index('')} has an empty name",
            "give it a name that a prompt can hold",
        )
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise InputError(f"{place}: two classes are named {twice!r}", "rename one: their prompts would be the same")


def _check_templates(templates: tuple[str, ...], place: str) -> None:
    if not templates:
        raise InputError(f"{place}: no templates", f"give at least one, for example {DEFAULT_TEMPLATES[0]!r}")
    for template in templates:
        before, hole, after = template.partition("{}")
        if not hole or set("{}") & set(before + after):
            raise InputError(
                f"{place}: template {template!r}", "write exactly one {} where the class name goes, and no other braces"
            )


def _check_train(task: Task, place: str) -> None:
    if not len(task.train):
        raise InputError(f"{place}: no training images", "add some, or use it as a probe, which is only tested")
    empty = np.flatnonzero(np.bincount(task.train.labels, minlength=len(task.classes)) == 0)
    if len(empty):
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise InputError(
            f"{place}: class {task.classes[empty[0]]!r} has no training images{more}",
            "add images of it, or take the class out",
        )
