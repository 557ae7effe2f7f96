"""Hard links, with a copy as the fallback."""

from __future__ import annotations

import os
from pathlib import Path

from r1export.errors import InputError
from r1export.update.atomic_io import make_folder, read_chunks, write_file


def link_or_copy(source: Path, target: Path) -> bool:
    """Link or copy `source` to the new path `target`; returns whether it is a link.

    Raises InputError if `source` is no regular file or not there, OSError for no space or no permission.
    """
    make_folder(target.parent)
    if source.is_symlink() or not source.is_file():
        raise InputError(f"{source} is missing or not a regular file", "copy it from the release it belongs to")
    try:
        os.link(source, target)
    except OSError:  # another file system, no support for links, or too many links
        write_file(target, read_chunks(source))
        return False
    return True
