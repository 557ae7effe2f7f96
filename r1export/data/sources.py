"""Where a task comes from: `load_task` turns the `source` of a recipe into a checked `Task`.

folder:DIR         images in folders by class: DIR/train/CLASS/* and DIR/test/CLASS/*, or DIR/CLASS/* (split 80/20)
npz:FILE           packed images (arrays `blob`, `off`, `label`, `split`, `names`)
torchvision:NAME   one of the eleven MTIL sets, or CIFAR10
hf:NAME            of the Hugging Face Hub, or a folder laid out like one of its data sets
builtin:NAME       comes with r1export: drawn, or in an installed package
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from r1export.data import torchvision_sets
from r1export.data.folder import read_folder
from r1export.data.huggingface import read_hub
from r1export.data.npz import read_pack
from r1export.data.synthetic import load_builtin
from r1export.data.task import Task, check_task
from r1export.errors import InputError


def load_task(
    source: str,
    *,
    name: str = "",
    root: Path | None = None,
    templates: tuple[str, ...] = (),
    download: bool = False,
    seed: int = 42,
    test_only: bool = False,
) -> Task:
    """The task at `source`, checked (see `check_task`); images are decoded only when they are read.

    Args:
        name: instead of the name that the source suggests.
        root: relative paths start here, and torchvision keeps its data sets here; may hold `~` and `${VARIABLE}`.
        templates: instead of the prompts of the source.
        download: let torchvision and the Hub fetch what is not there.
        seed: splits what has no train and test.
        test_only: for a probe, which needs no training images.

    Raises:
        InputError: unknown source, missing file, folder or environment variable, or data that cannot be used.
    """
    kind, _, rest = source.partition(":")
    place = source
    if kind == "folder" and rest:
        place = str(expand_path(rest, root))
        task = read_folder(Path(place), seed, test_only=test_only)
    elif kind == "npz" and rest:
        place = str(expand_path(rest, root))
        task = read_pack(Path(place))
    elif kind == "torchvision" and rest:
        task = torchvision_sets.load(rest, _torchvision_root(source, root), download=download)
    elif kind == "hf" and rest:
        hub_name, _, config = rest.partition(":")
        task = read_hub(hub_name, expand_path(hub_name, root), config, seed, download=download, test_only=test_only)
    elif kind == "builtin" and rest:
        task = load_builtin(rest)
    else:
        raise InputError(
            f"source {source!r} is unknown", "write folder:DIR, npz:FILE, torchvision:NAME, hf:NAME or builtin:NAME"
        )
    task = replace(task, name=name or task.name, templates=tuple(templates) or task.templates)
    check_task(task, place, test_only=test_only)
    return task


def expand_path(path: str | Path, root: Path | None = None) -> Path:
    """`path` with `~` and `${VARIABLE}` replaced, under `root` unless it is absolute. `root` is expanded in the same way.

    Raises:
        InputError: a variable that is not set or empty (named), or an unknown home folder.
    """

    def value(match: re.Match[str]) -> str:
        if not os.environ.get(match[1]):
            raise InputError(
                f"{path}: environment variable {match[1]} is not set",
                f"export {match[1]}=DIR, or write the path itself",
            )
        return os.environ[match[1]]

    text = re.sub(r"\$\{(\w+)\}", value, str(path))
    try:
        expanded = Path(text).expanduser()
    except RuntimeError:
        raise InputError(f"{path}: this machine has no such home folder", "write the path itself") from None
    return expanded if root is None else expand_path(root) / expanded


def _torchvision_root(source: str, root: Path | None) -> Path:
    if root is None:
        raise InputError(f"{source}: no folder to look for the data set in", "give data.root")
    return expand_path(root)
