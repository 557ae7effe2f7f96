"""The eleven data sets of MTIL (multi-domain task-incremental learning), read by torchvision, with prompts for CLIP.

Class names and templates (prompts.json) are those published with CLIP (github.com/openai/CLIP, data/prompts.md, MIT licence), in the
label order of torchvision. Two are as in the published MTIL figures instead: the digits of MNIST ("0 - zero"), and a ninth template
for StanfordCars.

Splits, also as in the published figures: the official ones, without the validation part of Aircraft (3,334 training images), DTD (1,880)
and Flowers102 (1,020), with that of OxfordIIITPet (3,680). Caltech101, EuroSAT and SUN397 have none: a random 80/20, generator seed 42.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from r1export.data.images import UPRIGHT_RGB, Decoding, images_from_files
from r1export.data.request import Request, expand_path
from r1export.data.task import ImageSet, Task
from r1export.errors import InputError

SPLIT_SEED = 42  # of the benchmark: another training seed must not move images between train and test


def read(request: Request) -> Task:
    """The reader of `torchvision:NAME`."""
    if request.root is None:
        raise InputError(f"{request.source}: data.root is not set", "set data.root to torchvision's data folder")
    return load(request.address, expand_path(request.root), download=request.download, decoding=request.decoding)


def load(name: str, root: Path, *, download: bool = False, decoding: Decoding = UPRIGHT_RGB) -> Task:
    """The data set that torchvision calls `name` (in any case), below `root`.

    The CIFAR sets are pickles; torchvision opens them only if their MD5 is the published one.

    Raises:
        InputError: unknown name, or a data set that is not there or not complete.
    """
    key = name.lower().removeprefix("fgvc")
    if key not in _SETS:
        raise InputError(
            f"unknown data set torchvision:{name}",
            f"known are {', '.join(entry.torchvision for entry in _SETS.values())}",
        )
    entry = _SETS[key]
    parts = [_open(entry, root, split, download) for split in entry.splits]
    classes = _name_classes(key, _own_names(parts[0]), root)
    sets = [entry.images(part, decoding) for part in parts]
    train, test = sets if len(sets) == 2 else _random_split(sets[0])
    return Task(key, classes, templates(key), train, test)


def class_names(key: str) -> tuple[str, ...]:
    """Class names of a set of the benchmark, or of cifar10, in torchvision's label order."""
    return tuple(_prompts()[key]["classes"])


def templates(key: str) -> tuple[str, ...]:
    """Templates of a set of the benchmark, or of cifar10."""
    return tuple(_prompts()[key]["templates"])


@cache
def _prompts() -> dict[str, dict[str, list[str]]]:
    prompts: dict[str, dict[str, list[str]]] = json.loads(
        resources.files(__package__).joinpath("prompts.json").read_text(encoding="utf-8")
    )
    return prompts


def _random_split(images: ImageSet) -> tuple[ImageSet, ImageSet]:
    """80/20, the same images as torch's `random_split` takes with a generator of that seed."""
    order = _permutation(len(images), SPLIT_SEED)
    cut = int(0.8 * len(images))
    return images.subset(order[:cut]), images.subset(order[cut:])


def _permutation(count: int, seed: int) -> np.ndarray:
    """torch.randperm on a CPU, without torch: the same Mersenne Twister, and the same exchanges from front to back."""
    order = np.arange(count)
    draws = np.random.RandomState(seed).randint(0, 2**32, count, dtype=np.uint32).tolist()
    for i, draw in enumerate(draws):
        j = i + draw % (count - i)
        order[i], order[j] = order[j], order[i]
    return order


def _own_names(dataset: Any) -> Sequence[str]:
    names: Sequence[str] = dataset.categories if hasattr(dataset, "categories") else dataset.classes
    return names


def _name_classes(key: str, own: Sequence[str], root: Path) -> tuple[str, ...]:
    """Our names in the order of the data set's `own`: by name if letters and digits agree, else by position.

    A copy with its classes in another order is either named correctly or an error, never mislabelled.
    """
    ours = class_names(key)
    if len(own) != len(ours):
        raise InputError(
            f"{root}: {key} has {len(own)} classes, expected {len(ours)}", "the copy is incomplete: download it again"
        )
    known = {_letters(name): name for name in ours}
    named = tuple(known.get(_letters(name), ours[label]) for label, name in enumerate(own))
    if len(set(named)) < len(named):
        label = next(i for i, name in enumerate(named) if name in named[:i])
        raise InputError(
            f"{root}: {key} has class {own[label]!r} at label {label}, expected {ours[label]!r}",
            "the copy is of another version: download it again",
        )
    return named


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())


def _open(entry: _Set, root: Path, split: dict[str, Any], download: bool) -> Any:
    from torchvision import datasets  # imported here: it takes seconds, and most runs don't need it

    if not (root.is_dir() or download):
        raise InputError(f"{root}: no such folder", "set data.root to torchvision's data folder")
    try:
        return getattr(datasets, entry.torchvision)(str(root), download=download, **split)
    except Exception as error:  # torchvision and scipy raise various exceptions for corrupted files
        remedy = (
            "check the network, or download it manually"
            if download
            else "download it (data.download = true), or set another data.root"
        )
        raise InputError(f"{root}: cannot open {entry.torchvision}: {error}", remedy) from error


def _files(dataset: Any, decoding: Decoding) -> ImageSet:
    """Opened with `loader=Path`, a data set yields paths, and no image is decoded to learn its label."""
    return _by_path([dataset[i] for i in range(len(dataset))], decoding)


def _caltech_files(dataset: Any, decoding: Decoding) -> ImageSet:
    folder = Path(dataset.root) / "101_ObjectCategories"
    names = (f"image_{number:04d}.jpg" for number in dataset.index)
    return _by_path(
        [(folder / dataset.categories[label] / name, label) for name, label in zip(names, dataset.y, strict=True)],
        decoding,
    )


def _pet_files(dataset: Any, decoding: Decoding) -> ImageSet:
    # Private, but the only way to the labels without decoding every image.
    return _by_path(list(zip(dataset._images, dataset._labels, strict=True)), decoding)


def _by_path(pairs: list[tuple[Path, int]], decoding: Decoding) -> ImageSet:
    """Sorted, because SUN397 lists its files as the file system does: a split has to be the same on every machine."""
    pairs = sorted(pairs)
    return images_from_files([path for path, _ in pairs], [int(label) for _, label in pairs], decoding)


def _pixels(dataset: Any, _: Decoding) -> ImageSet:
    pixels = np.asarray(dataset.data)  # uint8, (n, 32, 32, 3) or (n, 28, 28)
    return ImageSet.drawn(np.asarray(dataset.targets, np.int64), lambda i: Image.fromarray(pixels[i]).convert("RGB"))


@dataclass(frozen=True)
class _Set:
    """How torchvision's class is opened, once for train and once for test, or once if it has no split, and read."""

    torchvision: str
    images: Callable[[Any, Decoding], ImageSet]
    splits: tuple[dict[str, Any], ...]


def _file_splits(train: str, test: str) -> tuple[dict[str, Any], ...]:
    return {"split": train, "loader": Path}, {"split": test, "loader": Path}


_PIXEL_SPLITS = ({"train": True}, {"train": False})

_SETS = {
    "aircraft": _Set("FGVCAircraft", _files, _file_splits("train", "test")),
    "caltech101": _Set("Caltech101", _caltech_files, ({},)),
    "cifar10": _Set("CIFAR10", _pixels, _PIXEL_SPLITS),
    "cifar100": _Set("CIFAR100", _pixels, _PIXEL_SPLITS),
    "dtd": _Set("DTD", _files, _file_splits("train", "test")),
    "eurosat": _Set("EuroSAT", _files, ({"loader": Path},)),
    "flowers102": _Set("Flowers102", _files, _file_splits("train", "test")),
    "food101": _Set("Food101", _files, _file_splits("train", "test")),
    "mnist": _Set("MNIST", _pixels, _PIXEL_SPLITS),
    "oxfordiiitpet": _Set("OxfordIIITPet", _pet_files, ({"split": "trainval"}, {"split": "test"})),
    "stanfordcars": _Set("StanfordCars", _files, _file_splits("train", "test")),
    "sun397": _Set("SUN397", _files, ({"loader": Path},)),
}
