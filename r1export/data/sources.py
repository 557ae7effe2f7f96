"""Task sources: `load_task` turns the `source` of a recipe into a checked `Task`.

folder:DIR         images in folders by class: DIR/train/CLASS/* and DIR/test/CLASS/*, or DIR/CLASS/* (split 80/20)
npz:FILE           packed images (arrays `blob`, `off`, `label`, `split`, `names`)
torchvision:NAME   one of the eleven MTIL sets, or CIFAR10
hf:NAME            a Hugging Face data set, on the Hub or in a local folder
builtin:NAME       included in r1export: drawn, or from an installed package
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from r1export.data import folder, huggingface, npz, synthetic, torchvision_sets
from r1export.data.request import Request
from r1export.data.task import Task, check_task
from r1export.errors import InputError

READERS: dict[str, Callable[[Request], Task]] = {
    "folder": folder.read,
    "npz": npz.read,
    "torchvision": torchvision_sets.read,
    "hf": huggingface.read,
    "builtin": synthetic.read,
}


def read_task(request: Request) -> Task:
    """The task that `request` names as its reader gives it, unchecked. Raises as `load_task` does, but for what `check_task` finds."""
    if request.scheme not in READERS or not request.address:
        raise InputError(
            f"unknown source {request.source!r}",
            "use folder:DIR, npz:FILE, torchvision:NAME, hf:NAME or builtin:NAME",
        )
    return READERS[request.scheme](request)


def load_task(request: Request, *, name: str = "", templates: tuple[str, ...] = ()) -> Task:
    """The checked task of `request` (see `check_task`); images are decoded on access.

    `name` and `templates`, where they are not empty, replace those of the source.

    Raises:
        InputError: unknown source, missing file, folder or environment variable, or data that cannot be used.
        Unsupported: a package that the reader needs is not installed.
    """
    task = read_task(request)
    task = replace(task, name=name or task.name, templates=templates or task.templates)
    check_task(task, request.source, test_only=request.test_only)
    return task
