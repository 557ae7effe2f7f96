"""Photographs that come with r1export, at 128 pixels: tasks that `builtin:photo` does not know, and objects that it does.

Their sources and licences are in NOTICE; scripts/pack_photos.py makes the files.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from r1export.data.npz import read_pack
from r1export.data.task import Task

FOLDER = Path(__file__).parent / "builtin"
PACKS = {  # name -> prompts
    "trash6": ("a photo of {}.", "a photo of {} waste.", "a piece of {}."),
    "clothing10": ("a photo of a {}, a type of clothing.", "a photo of a {}.", "a picture of a {}, something to wear."),
    "signdigits": ("a hand that shows the number {}.", "the sign for {}.", "a photo of {} fingers."),
    "objects33": ("a photo of a {}.", "a picture of a {}.", "a close-up photo of a {}."),
}


def load_packed(name: str) -> Task:
    """The task `builtin:NAME` of one of PACKS."""
    return replace(read_pack(FOLDER / f"{name}.npz"), templates=PACKS[name])
