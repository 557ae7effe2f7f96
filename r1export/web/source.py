"""The source of the web server: a release folder, or the current version of a device store.

For a store in overlay mode, which has no files of a version, the bytes are derived from the base on access.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from r1export.device.slot_files import check_slot
from r1export.device.store import BASE, Store
from r1export.device.version import Version, open_version
from r1export.errors import CheckFailed, InputError
from r1export.update.atomic_io import CHUNK
from r1export.update.manifest import File
from r1export.update.release_layout import MANIFEST
from r1export.update.release_manifest import Release

REMEMBERED = 4  # versions that are still served after a switch; a page needs one or two


@dataclass(frozen=True)
class Opened:
    """A file's length in bytes and its content, piece by piece."""

    nbytes: int
    pieces: Iterable[bytes | memoryview]


Open = Callable[[], AbstractContextManager[Opened]]


@dataclass(frozen=True)
class Served:
    """One version: the SHA-256 of its manifest.json, and how to open each of its files."""

    sha256: str
    files: Mapping[str, Open]


Source = Callable[[], Served]  # the version that is current now; raises R1ExportError where there is none


def open_source(path: Path) -> Source:
    """The source for a release folder or a device store, after a check of all its files.

    Raises:
        InputError: `path` is neither, or malformed.
        CheckFailed: a digest mismatch.
    """
    if (path / "store.json").is_file():
        store = Store.open(path)
        check_slot(store, store.current)
        return store_source(path)
    if (path / MANIFEST).is_file():
        return release_source(path)
    raise InputError(
        f"{path} is neither a release nor a device store: it has no {MANIFEST} and no store.json",
        "use a folder in RUN/releases, or a store from `r1export device init`",
    )


def release_source(path: Path) -> Source:
    """A release in its current state. The page rejects files that are modified later, by their digest.

    Raises:
        InputError: not a release.   CheckFailed: the manifest was edited, or a file is corrupted.
    """
    folder = path.resolve()
    release = Release.read(folder)
    if release.manifest.sha256 != release.manifest.digest():
        raise CheckFailed(f"{path / MANIFEST} was edited: self-digest mismatch", "copy the release from its run again")
    release.check()
    served = Served(release.manifest_sha256, _on_disk(folder, [*release.manifest.files, MANIFEST]))
    return lambda: served


def store_source(path: Path) -> Source:
    """The version that is current at the time of a request. Raises InputError if there is no store."""

    @lru_cache(REMEMBERED)
    def version(slot: str) -> Served:
        return _of_slot(Store.open(path), slot)

    return lambda: version(Store.open(path).current)


def _of_slot(store: Store, slot: str) -> Served:
    if slot == BASE:
        base = store.base()
        return Served(base.manifest_sha256, _on_disk(base.path.resolve(), [*base.manifest.files, MANIFEST]))
    version = open_version(store.path, slot)
    assert version.bundle is not None
    files = {file.path: file for file in version.bundle.manifest.files}
    if MANIFEST not in files:
        raise InputError(f"version {version.name} has no {MANIFEST}", "bundle a release with a manifest")
    if version.files_there:
        return Served(files[MANIFEST].sha256, _on_disk(version.folder.resolve(), files))
    derived = {name: partial(_derive, version, file) for name, file in files.items()}
    return Served(files[MANIFEST].sha256, derived)


@contextmanager
def _derive(version: Version, file: File) -> Iterator[Opened]:
    yield Opened(file.nbytes, version.chunks(file))


def _on_disk(folder: Path, names: Iterable[str]) -> dict[str, Open]:
    return {name: partial(_read, folder / name) for name in names}


@contextmanager
def _read(path: Path) -> Iterator[Opened]:
    """A regular file; `path` is absolute. Raises OSError for links, pipes and missing files."""
    if path.resolve() != path:
        raise OSError(f"{path} is a link, or inside one")
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is not a file")
        yield Opened(status.st_size, iter(partial(file.read, CHUNK), b""))
