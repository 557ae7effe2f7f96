"""A task from images in one folder per class, as in torchvision's ImageFolder.

DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg    given split; also Train/, TEST/, and val/ or validation/ for test/
DIR/CLASS/*.jpg                                   a fifth of each class is the test split
DIR/classes.json or DIR/classes.txt               names of the classes by folder: {"n01440764": "tench"}, or lines "n01440764 tench"

Images in sub-folders of a class belong to the class. Other files and hidden entries are skipped and noted.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from r1export.data.images import FOREIGN_SUFFIXES, SUFFIXES, UPRIGHT_RGB, Decoding, images_from_files
from r1export.data.request import Request
from r1export.data.task import DEFAULT_TEMPLATES, ImageSet, Task, held_out
from r1export.errors import InputError, Unsupported
from r1export.update.atomic_io import read_regular
from r1export.update.names import PRINTABLE
from r1export.update.strict_json import parse_json

TESTS = ("test", "val", "valid", "validation")  # the first that exists is the test split
MAX_NAMES = 16 << 20  # bytes of classes.json or classes.txt
NAMED = 3  # files named in a note; the rest are counted

Files = dict[str, list[Path]]  # by name of the class folder


def read(request: Request) -> Task:
    """The reader of `folder:DIR`."""
    return _Reader(request.path, request.decoding, skip_broken=request.skip_broken).task(
        request.seed, test_only=request.test_only
    )


def read_folder(folder: Path, seed: int, *, test_only: bool = False) -> Task:
    """The images under `folder`; a class is named after its folder, with spaces for underscores, or by classes.json or classes.txt.

    `seed` splits a folder without train and test. With `test_only`, such a folder is all test, and train may be missing.

    Raises:
        InputError: no class folders, an incomplete split, an unsupported image format, a name that is not Unicode, or class
            names that don't match the folders.
        Unsupported: an unreadable folder.
    """
    return _Reader(folder, UPRIGHT_RGB).task(seed, test_only=test_only)


@dataclass(frozen=True)
class _Reader:
    """Reads one folder and collects the skipped entries by kind."""

    folder: Path
    decoding: Decoding
    skip_broken: bool = False
    left_out: dict[str, set[str]] = field(default_factory=dict)

    def task(self, seed: int, *, test_only: bool) -> Task:
        if not self.folder.is_dir():
            raise InputError(f"{self.folder}: no such folder", "use a folder with one sub-folder of images per class")
        train, test = self._given_split(test_only) or self._own_split(seed, test_only)
        names = sorted(train | test)
        if not names:
            raise InputError(
                f"{self.folder}: no class folders",
                "put the images of each class into a folder with the name of the class",
            )
        classes = self._class_names(names)
        self._refuse_foreign()
        return Task(
            self.folder.resolve().name,
            classes,
            DEFAULT_TEMPLATES,
            self._images(train, names),
            self._images(test, names),
            tuple(self._notes()),
        )

    def _given_split(self, test_only: bool) -> tuple[Files, Files] | None:
        """None unless a split folder contains folders: one that contains images is a class of that name."""
        splits = {name: self._by_class(path) for name, path in self._splits().items()}
        present = [name for name, files in splits.items() if files]
        if not present:
            return None
        tests = [name for name in TESTS if name in present]
        if not tests or not ("train" in present or test_only):
            missing = "test" if "train" in present else "train"
            raise InputError(
                f"{self.folder}: has {present[0]}/ but no {missing}/ with class folders",
                f"add {missing}/, or move the class folders up",
            )
        used = {"train", tests[0]}
        for sub in self._entries(self.folder):
            if sub.is_dir() and sub.name.lower() not in used:
                self._leave_out("folder outside of the splits", sub)
        return splits.get("train", {}), splits[tests[0]]

    def _splits(self) -> dict[str, Path]:
        """The folders named train, test or val, whatever their case."""
        splits: dict[str, Path] = {}
        for sub in _listed(self.folder):
            if sub.is_dir() and (name := sub.name.lower()) in ("train", *TESTS):
                if name in splits:
                    raise InputError(f"{self.folder}: both {splits[name].name}/ and {sub.name}/", "merge the two")
                splits[name] = sub
        return splits

    def _own_split(self, seed: int, test_only: bool) -> tuple[Files, Files]:
        files = self._by_class(self.folder)
        if test_only:
            return {}, files
        train, test = {}, {}
        for name, images in files.items():
            indices = held_out(len(images), seed)
            train[name] = [file for i, file in enumerate(images) if i not in indices]
            test[name] = [file for i, file in enumerate(images) if i in indices]
        return train, test

    def _by_class(self, folder: Path) -> Files:
        files: Files = {}
        for path in self._entries(folder):
            if path.is_dir():
                files[_unicode(path).name] = list(self._pictures(path))
            elif path.suffix.lower() in SUFFIXES | FOREIGN_SUFFIXES:
                self._leave_out("image outside of a class folder", path)
        return files

    def _pictures(self, folder: Path) -> Iterator[Path]:
        """The image files of a class, sub-folders after the folder itself."""
        subs = []
        for path in self._entries(folder):
            if path.is_dir():
                subs.append(path)
            elif path.suffix.lower() in SUFFIXES:
                yield path
            elif path.suffix.lower() in FOREIGN_SUFFIXES:
                self._leave_out("unsupported image format", path)
            else:
                self._leave_out("not an image", path)
        for sub in subs:
            yield from self._pictures(sub)

    def _entries(self, folder: Path) -> Iterator[Path]:
        """The entries of a folder, sorted, without hidden ones."""
        for path in _listed(folder):
            if path.name.startswith("."):
                self._leave_out("hidden entry", path)
            else:
                yield path

    def _leave_out(self, kind: str, path: Path) -> None:
        self.left_out.setdefault(kind, set()).add(path.relative_to(self.folder).as_posix())

    def _refuse_foreign(self) -> None:
        foreign = self.left_out.get("unsupported image format", set())
        if foreign and not self.skip_broken:
            raise InputError(
                f"{self.folder}: {_some(foreign)}: unsupported image format",
                "convert to JPEG or PNG, or set data.skip_broken = true",
            )

    def _notes(self) -> Iterator[str]:
        for kind, names in self.left_out.items():
            yield f"skipped ({kind}): {_some(names)}"

    def _class_names(self, folders: list[str]) -> tuple[str, ...]:
        """The names of classes in the order of their folders."""
        given = self._given_names()
        if given is None:
            return tuple(name.replace("_", " ") for name in folders)
        if missing := [name for name in folders if name not in given]:
            raise InputError(
                f"{self.folder}: no class name for the folder {_some(missing)}",
                "add a line for each folder",
            )
        if unknown := sorted(set(given) - set(folders)):
            self.left_out["class name without a folder"] = set(unknown)
        return tuple(given[name] for name in folders)

    def _given_names(self) -> Mapping[str, str] | None:
        """The content of classes.json or classes.txt; None if neither exists."""
        files = [self.folder / name for name in ("classes.json", "classes.txt") if (self.folder / name).exists()]
        if len(files) > 1:
            raise InputError(f"{self.folder}: both classes.json and classes.txt exist", "remove one of them")
        return _read_names(files[0]) if files else None

    def _images(self, files: Files, names: list[str]) -> ImageSet:
        pairs = [(file, label) for label, name in enumerate(names) for file in files.get(name, [])]
        return images_from_files([file for file, _ in pairs], [label for _, label in pairs], self.decoding)


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except PermissionError:
        raise Unsupported(f"{folder}: permission denied", "make the folder readable for your user") from None


def _unicode(path: Path) -> Path:
    """Raises InputError for a name that can't be part of a prompt."""
    try:
        path.name.encode()
    except UnicodeEncodeError:
        name = os.fsencode(path.name).decode("ascii", "backslashreplace")
        raise InputError(f"{path.parent}: the folder name {name!r} is not UTF-8", "rename it") from None
    return path


def _read_names(file: Path) -> dict[str, str]:
    remedy = 'use {"FOLDER": "class name"}' if file.suffix == ".json" else "use lines of FOLDER and class name"
    data = read_regular(file, MAX_NAMES)
    if file.suffix == ".json":
        try:
            fields = parse_json(data, str(file), MAX_NAMES)
            return {folder: fields.text(folder, PRINTABLE) for folder in list(fields)}
        except InputError as error:
            raise InputError(error.message, remedy) from None
    try:
        lines = [line for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 ({error.reason})", remedy) from None
    named = {}
    for line in lines:
        folder, _, name = line.strip().partition("\t" if "\t" in line else " ")
        if not name.strip() or folder in named:
            problem = "names a folder twice" if folder in named else "has no class name"
            raise InputError(f"{file}: the line {line.strip()[:60]!r} {problem}", remedy)
        named[folder] = name.strip()
    return named


def _some(names: Collection[str]) -> str:
    more = f" (and {len(names) - NAMED} more)" if len(names) > NAMED else ""
    return ", ".join(sorted(names)[:NAMED]) + more
