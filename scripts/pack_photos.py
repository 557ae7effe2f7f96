"""Pack the photographs that come with r1export: three tasks that `builtin:photo` does not know, and a probe of what it knows.

    python scripts/pack_photos.py --source FOLDER

FOLDER holds packs of whole data sets as `npz:` reads them, at 128 pixels: trash6, clothing10, signdigits, caltech101. Of
each class the first pictures of each split are taken, their compressed bytes unchanged. Sources and licences: NOTICE.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from r1export.data.npz import TEST, TRAIN
from r1export.data.packed import FOLDER, PACKS

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Classes of Caltech-101 whose name is one of ImageNet's, or a synonym in WordNet of one.
KNOWN = ("Leopards", "accordion", "ant", "barrel", "beaver", "cannon", "cellphone", "crayfish", "cup", "dalmatian", "dragonfly",
    "electric_guitar", "ewer", "flamingo", "grand_piano", "hedgehog", "laptop", "llama", "nautilus", "panda", "pizza", "platypus",
    "revolver", "rooster", "saxophone", "schooner", "scorpion", "soccer_ball", "starfish", "strawberry", "tick", "trilobite",
    "umbrella")  # fmt: skip


@dataclass(frozen=True)
class Selection:
    """What is taken of one data set: pictures of a class in each split, which classes (empty: all), and their new names."""

    source: str
    train: int
    test: int
    classes: tuple[str, ...] = ()
    renamed: dict[str, str] = field(default_factory=dict)


SELECTIONS = {
    "trash6": Selection("trash6", 80, 30),
    "clothing10": Selection("clothing10", 64, 30, renamed={"longsleeve": "long-sleeved shirt", "outwear": "jacket"}),
    "signdigits": Selection("signdigits", 64, 30, renamed=dict(zip("0123456789", DIGITS, strict=True))),
    "objects33": Selection("caltech101", 0, 10, KNOWN, {"Leopards": "leopard"}),
}


def pack(source: Path, selection: Selection, target: Path) -> None:
    """Write the selected pictures of `source` to `target`."""
    with np.load(source, allow_pickle=False) as whole:
        arrays = {name: whole[name] for name in ("blob", "off", "label", "split", "names")}
    names = [str(name) for name in arrays["names"]]
    classes = selection.classes or tuple(names)
    labels, splits, pictures = [], [], []
    for label, name in enumerate(classes):
        for split, count in ((TRAIN, selection.train), (TEST, selection.test)):
            rows = np.flatnonzero((arrays["label"] == names.index(name)) & (arrays["split"] == split))[:count]
            pictures += [arrays["blob"][arrays["off"][row] : arrays["off"][row + 1]] for row in rows]
            labels += [label] * len(rows)
            splits += [split] * len(rows)
    off = np.concatenate([[0], np.cumsum([len(picture) for picture in pictures])]).astype(np.int64)
    new_names = np.array([selection.renamed.get(name, name) for name in classes])
    np.savez(
        target,
        blob=np.concatenate(pictures),
        off=off,
        label=np.array(labels, np.int16),
        split=np.array(splits, np.uint8),
        names=new_names,
    )
    print(f"{target.name}: {len(classes)} classes, {len(pictures)} pictures, {target.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with the packs of the whole data sets")
    options = parser.parse_args()
    assert SELECTIONS.keys() == PACKS.keys()
    for name, selection in SELECTIONS.items():
        pack(options.source / f"{selection.source}.npz", selection, FOLDER / f"{name}.npz")


if __name__ == "__main__":
    main()
