"""Atomic writes (temporary name, sync, rename), and safe reads of untrusted files.

File modes don't depend on the umask, since a device's updater may run under any.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from r1export.errors import InputError

CHUNK = 1 << 20  # bytes read at a time: enough to hash at full speed, little compared with a model
FILE_MODE, FOLDER_MODE = 0o644, 0o755
PARTIAL = ".partial"  # suffix of hidden temporary names


def inside(root: Path, name: str) -> Path:
    """`root / name` for an untrusted name.

    Raises InputError if the name is absolute, contains `..`, or leads over a link.
    """
    segments = name.split("/")
    ways = [root.joinpath(*segments[:depth]) for depth in range(1, len(segments) + 1)]
    plain = not {"", ".", ".."} & set(segments) and name.isprintable()  # a NUL ends a path, a surrogate is invalid
    if not plain or any(path.is_symlink() for path in ways):
        raise InputError(
            f"{ascii(name)[:100]} leads out of {root}, or over a link", "copy the files from their source again"
        )
    return root / name


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading: a pipe would block, a device has no end.

    Raises:
        InputError: not a regular file.   OSError: missing or unreadable.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except ValueError as error:
        raise InputError(f"{ascii(str(path))[:100]} is not a path: {error}", "check the path") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{path} is not a regular file", "replace it with a regular file")
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, limit: int) -> bytes:
    """A file's bytes, at most `limit`. Raises InputError if there are more, and like `open_regular`."""
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise InputError(f"{path} has more than {limit} bytes", "check that it is the right file")
    return data


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes in lower-case hex."""
    digest = hashlib.sha256()
    for chunk in read_chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def read_chunks(path: Path) -> Iterator[bytes]:
    """A file's bytes, piece by piece. Raises like `open_regular`."""
    with open_regular(path) as file:
        while chunk := file.read(CHUNK):
            yield chunk


def sha256_bytes(data: Any) -> str:
    """SHA-256 of a buffer (bytes, or a contiguous array) in lower-case hex."""
    return hashlib.sha256(data).hexdigest()


def write_file(path: Path, chunks: bytes | Iterable[bytes | memoryview], mode: int = FILE_MODE) -> None:
    """Write `path` atomically: on any failure the old file is kept.

    Raises:
        OSError: no space, no permission. The temporary file is removed, also if `chunks` raises.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            for chunk in [chunks] if isinstance(chunks, bytes) else chunks:
                file.write(chunk)
            file.flush()
            os.chmod(temporary, mode)  # mkstemp's 0600 would lock other users out of a release
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN and Infinity are refused with ValueError."""
    write_file(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """`value` as indented JSON in UTF-8; NaN and Infinity are refused with ValueError."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents, readable for everybody."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir()
    path.chmod(FOLDER_MODE)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Create the folder `path` atomically: it appears only if the block succeeds; an existing `path` is replaced.

    The block writes to a hidden folder next to `path`, which is removed on failure.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent))
    try:
        partial.chmod(FOLDER_MODE)
        yield partial
        replaced = partial.with_name(partial.name + ".old")
        if path.exists():
            os.replace(path, replaced)
        os.replace(partial, path)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(path.parent)
