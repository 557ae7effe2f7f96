"""Write photographs that come with r1export as image files, one folder per class: a data set for trying things out.

    python scripts/sample_photos.py trash6 FOLDER --train 40 --test 20

The sets are trash6, clothing10, signdigits and objects33 (test images only); sources and licences are in NOTICE.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import numpy as np

from r1export.data.npz import TEST, TRAIN
from r1export.data.packed import FOLDER, PACKS


def write_photos(name: str, folder: Path, limits: dict[str, int]) -> int:
    """Write the first `limits[split]` images of each class of a set to FOLDER/SPLIT/CLASS, and return how many there are."""
    written = 0
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as pack:
        blob, off, labels, splits = (pack[key] for key in ("blob", "off", "label", "split"))
        for split, number in (("train", TRAIN), ("test", TEST)):
            for label, title in enumerate(pack["names"]):
                rows = np.flatnonzero((labels == label) & (splits == number))
                for place, row in enumerate(islice(rows, limits[split])):
                    file = folder / split / str(title) / f"{place:03}.webp"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(blob[off[row] : off[row + 1]].tobytes())
                    written += 1
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("set", choices=PACKS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=1000, help="training images per class, at most")
    parser.add_argument("--test", type=int, default=1000, help="test images per class, at most")
    options = parser.parse_args()
    count = write_photos(options.set, options.folder, {"train": options.train, "test": options.test})
    print(f"{count} images in {options.folder}")


if __name__ == "__main__":
    main()
