"""One file under two names: a hard link where the file system has them, else a copy."""

from __future__ import annotations

import os
from pathlib import Path

from r1export.errors import InputError
from r1export.update.atomic_io import make_folder, read_chunks, write_file


def link_or_copy(source: Path, target: Path) -> bool:
    """Give `source` the further name `target`, which is not there yet; whether both are one file now.

    Raises InputError if `source` is no regular file or not there, OSError for no space or no permission.
    """
    make_folder(target.parent)
    if source.is_symlink() or not source.is_file():
        raise InputError(f"{source} is missing or no regular file", "copy it from the release it belongs to")
    try:
        os.link(source, target)
    except OSError:  # another file system, one without links, or too many of them
        write_file(target, read_chunks(source))
        return False
    return True
