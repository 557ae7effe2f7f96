"""A task from images in folders by class, as torchvision's ImageFolder has them.

DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg    the split is given
DIR/CLASS/*.jpg                                   a fifth of each class is held out for the test
"""

from __future__ import annotations

from pathlib import Path

from r1export.data.images import SUFFIXES, images_from_files
from r1export.data.request import Request
from r1export.data.task import DEFAULT_TEMPLATES, ImageSet, Task, held_out
from r1export.errors import InputError

Files = dict[str, list[Path]]  # by name of the class folder


def read(request: Request) -> Task:
    """The reader of `folder:DIR`."""
    return read_folder(request.path, request.seed, test_only=request.test_only)


def read_folder(folder: Path, seed: int, *, test_only: bool = False) -> Task:
    """The images under `folder`; a class is named after its folder, with spaces for underscores.

    `seed` splits a folder that has no train and test. With `test_only`, such a folder is all test, and train may be missing.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder", "give a folder with one sub-folder of images per class")
    train, test = _given_split(folder, test_only) or _own_split(folder, seed, test_only)
    names = sorted(train | test)
    if not names:
        raise InputError(
            f"{folder}: no folders in it", "put the images of each class into a folder named after the class"
        )
    classes = tuple(name.replace("_", " ") for name in names)
    return Task(folder.resolve().name, classes, DEFAULT_TEMPLATES, _images(train, names), _images(test, names))


def _given_split(folder: Path, test_only: bool) -> tuple[Files, Files] | None:
    """None unless train or test holds folders: one that holds images is a class of that name."""
    train, test = _by_class(folder / "train"), _by_class(folder / "test")
    if not train and not test:
        return None
    if not test or not (train or test_only):
        present, missing = ("train", "test") if train else ("test", "train")
        raise InputError(
            f"{folder}: has {present}/ but no {missing}/ with a folder per class",
            f"add {missing}/, or move the class folders up",
        )
    return train, test


def _own_split(folder: Path, seed: int, test_only: bool) -> tuple[Files, Files]:
    files = _by_class(folder)
    if test_only:
        return {}, files
    test_indices = {name: held_out(len(images), seed) for name, images in files.items()}
    train = {
        name: [file for i, file in enumerate(images) if i not in test_indices[name]] for name, images in files.items()
    }
    test = {name: [file for i, file in enumerate(images) if i in test_indices[name]] for name, images in files.items()}
    return train, test


def _by_class(folder: Path) -> Files:
    if not folder.is_dir():
        return {}
    return {
        sub.name: _image_files(sub) for sub in sorted(folder.iterdir()) if sub.is_dir() and not sub.name.startswith(".")
    }


def _image_files(folder: Path) -> list[Path]:
    return sorted(
        file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    )


def _images(files: Files, names: list[str]) -> ImageSet:
    pairs = [(file, label) for label, name in enumerate(names) for file in files.get(name, [])]
    return images_from_files([file for file, _ in pairs], [label for _, label in pairs])
