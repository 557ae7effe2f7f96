"""Patterns of names in a manifest. They list every allowed character and must match the whole name.

They don't use `.` and `$`, which accept line breaks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from r1export.errors import InputError
from r1export.update.release_layout import UPDATE

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")  # of a release, a task, a product, a package
TEXT = re.compile(r"[\x20-\x7e]{1,200}")
PARAMETER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,199}")
PATH = re.compile(r"(?=[^\n]{1,200}\Z)[A-Za-z0-9_][A-Za-z0-9._+-]*(/[A-Za-z0-9_][A-Za-z0-9._+-]*){0,7}")
DIGEST = re.compile(r"[0-9a-f]{64}")  # a SHA-256
# Text in any script, without control characters, line breaks and bidirectional overrides
PRINTABLE = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]{1,1000}")
OWN_FILES = (UPDATE,)  # the device's own files in a slot
_RESERVED = re.compile(r"(?i:con|prn|aux|nul|com[0-9]|lpt[0-9])(\.[^/]*)?")  # reserved names on Windows
_REMEDY = "download the file again, or rebuild it"


def is_special(name: str) -> bool:
    """Whether an operating system or an updater treats a file of this name specially."""
    return bool(_RESERVED.fullmatch(name)) or name.endswith(".")


def check_paths(paths: Iterable[str], location: str) -> None:
    """Check the names of all files of one folder, each of which matches PATH; `location` names the list in errors.

    Raises InputError: two differ in case only (Windows and macOS ignore it), one stands where another needs a folder, or
    one is treated specially by an operating system or an updater.
    """
    names = [path.casefold() for path in paths]
    taken = set(names)
    if len(taken) != len(names):
        raise InputError(f"{location}: two file names differ only in case", _REMEDY)
    for name in names:
        segments = name.split("/")
        parents = {"/".join(segments[:depth]) for depth in range(1, len(segments))}
        if parents & taken or name in OWN_FILES or any(map(is_special, segments)):
            raise InputError(f"{location}: {name} is reserved or conflicts with another name", _REMEDY)
