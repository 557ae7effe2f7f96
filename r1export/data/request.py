"""The request of a recipe to an image reader, and the expansion of paths."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from r1export.data.images import UPRIGHT_RGB, Decoding
from r1export.errors import InputError


@dataclass(frozen=True)
class Request:
    """One source of a recipe, `SCHEME:ADDRESS`.

    `root` is the base of relative paths and torchvision's data folder. `seed` splits sources without train and test. With
    `test_only` no training images are needed, and a source without a split is all test. With `skip_broken` unreadable images
    are skipped and noted.
    """

    source: str
    root: Path | None = None
    seed: int = 42
    download: bool = False
    test_only: bool = False
    skip_broken: bool = False
    decoding: Decoding = UPRIGHT_RGB

    @property
    def scheme(self) -> str:
        return self.source.partition(":")[0]

    @property
    def address(self) -> str:
        return self.source.partition(":")[2]

    @property
    def path(self) -> Path:
        """The address as a path. Raises InputError as `expand_path` does."""
        return expand_path(self.address, self.root)


def expand_path(path: str | Path, root: Path | None = None) -> Path:
    """`path` with `~` and `${VARIABLE}` replaced, under `root` unless it is absolute. `root` is expanded in the same way.

    Raises:
        InputError: a variable that is not set or empty (named), or an unknown home folder.
    """

    def value(match: re.Match[str]) -> str:
        if not os.environ.get(match[1]):
            raise InputError(
                f"{path}: environment variable {match[1]} is not set",
                f"export {match[1]}=DIR, or use the path itself",
            )
        return os.environ[match[1]]

    text = re.sub(r"\$\{(\w+)\}", value, str(path))
    try:
        expanded = Path(text).expanduser()
    except RuntimeError:
        raise InputError(f"{path}: no such home folder", "use the path itself") from None
    return expanded if root is None else expand_path(root) / expanded
