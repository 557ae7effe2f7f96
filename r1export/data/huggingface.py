"""A task from a Hugging Face data set, on the Hub or in a local folder; requires the `hf` extra.

hf:OWNER/NAME          from the local Hub cache, or downloaded with data.download
hf:DIR                 a folder that `datasets.load_dataset` reads: Parquet, images by folder, ...
hf:OWNER/NAME:CONFIG   one configuration of several

The first image column and the first class label column are used. The test split is `test`, else `validation`, else a
fifth of each class. No code of the data set is run: `datasets` has no loading scripts since version 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from r1export.data.images import Decoding, decode
from r1export.data.request import Request, expand_path
from r1export.data.task import DEFAULT_TEMPLATES, ImageSet, Picture, Task, held_out
from r1export.errors import InputError, Unsupported


def read(request: Request) -> Task:
    """The reader of `hf:NAME` and `hf:NAME:CONFIG`. Labels are read immediately, images on demand.

    Raises:
        InputError: no such data set or configuration, or no column of images or class labels.
        Unsupported: the package `datasets` is not installed.
    """
    name, _, config = request.address.partition(":")
    splits = _splits(name, expand_path(name, request.root), config, request.download)
    image, label, classes = _columns(name, next(iter(splits.values())))
    columns = _Columns(name, image, label, request.decoding)
    train = columns.images(splits, "train")
    test = next((columns.images(splits, key) for key in ("test", "validation") if key in splits), None)
    if test is None and request.test_only:
        train, test = train.subset(np.arange(0)), train
    elif test is None:
        train, test = _own_split(train, request.seed)
    return Task(name.rstrip("/").rpartition("/")[2], classes, DEFAULT_TEMPLATES, train, test)


def _splits(name: str, folder: Path, config: str, download: bool) -> dict[str, Any]:
    try:
        import datasets
        from huggingface_hub import snapshot_download
    except ImportError:
        raise Unsupported("the package datasets is not installed", "pip install 'r1export[hf]'") from None
    try:
        path = (
            folder if folder.is_dir() else snapshot_download(name, repo_type="dataset", local_files_only=not download)
        )
    except (OSError, ValueError) as error:
        if download:
            raise InputError(f"hf:{name}: {_line(error)}", "check the name and the network") from error
        raise InputError(
            f"hf:{name}: neither a folder nor in the local Hub cache", "set data.download = true to download it"
        ) from error
    try:
        splits: dict[str, Any] = datasets.load_dataset(str(path), config or None)
    except Exception as error:  # pyarrow, YAML and JSON parsers raise various exceptions for corrupted files
        remedy = "choose a configuration with hf:NAME:CONFIG, or fix the data set"
        raise InputError(f"hf:{name}: {_line(error)}", remedy) from error
    return splits


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _columns(name: str, split: Any) -> tuple[str, str, tuple[str, ...]]:
    """The columns of images and labels, and the names of the classes."""
    import datasets

    images = [column for column, kind in split.features.items() if isinstance(kind, datasets.Image)]
    labels = [column for column, kind in split.features.items() if isinstance(kind, datasets.ClassLabel)]
    if not images or not labels:
        columns = ", ".join(f"{column} ({type(kind).__name__})" for column, kind in split.features.items())
        raise InputError(
            f"hf:{name}: columns {columns}; expected one Image and one ClassLabel",
            "cast the columns, or use another data set",
        )
    return images[0], labels[0], tuple(each.replace("_", " ") for each in split.features[labels[0]].names)


@dataclass(frozen=True)
class _Columns:
    """The columns of images and labels of the data set `name`."""

    name: str
    image: str
    label: str
    decoding: Decoding

    def images(self, splits: dict[str, Any], split: str) -> ImageSet:
        """The images of a split, none if there is no such split."""
        if split not in splits:
            return ImageSet(np.zeros(0, np.int64), _nothing)
        import datasets

        rows = splits[split].select_columns([self.image]).cast_column(self.image, datasets.Image(decode=False))

        def read(i: int) -> Picture:
            location, stored = f"hf:{self.name}: image {i} of {split}", rows[i][self.image]
            if stored is None:
                raise InputError(f"{location} is missing", "remove the row")
            source = Path(stored["path"] or "") if stored["bytes"] is None else stored["bytes"]
            return decode(source, location, self.decoding)

        labels = splits[split][self.label][:]
        if None in labels:
            row = labels.index(None)
            raise InputError(f"hf:{self.name}: row {row} of {split} has no label", "add a label or remove the row")
        return ImageSet(np.asarray(labels, np.int64), read)


def _nothing(i: int) -> Picture:
    raise IndexError(i)


def _own_split(images: ImageSet, seed: int) -> tuple[ImageSet, ImageSet]:
    if not len(images):
        return images, images
    members = [np.flatnonzero(images.labels == label) for label in np.unique(images.labels)]
    test = np.sort(np.concatenate([indices[sorted(held_out(len(indices), seed))] for indices in members]))
    return images.subset(np.setdiff1d(np.arange(len(images)), test)), images.subset(test)
