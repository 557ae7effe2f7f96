"""A task from one `.npz` pack of compressed images.

blob   uint8 (bytes,)    image files (WebP, PNG, JPEG, ...) end to end
off    integers (n + 1,) image i is blob[off[i]:off[i + 1]]
label  integers (n,)     class of image i
split  integers (n,)     0 train, 2 test; others are left out
names  strings (c,)      class names; of comma-separated synonyms the first counts
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

import numpy as np

from r1export.data.images import UPRIGHT_RGB, Decoding, decode
from r1export.data.request import Request
from r1export.data.task import DEFAULT_TEMPLATES, ImageSet, Picture, Task
from r1export.errors import InputError

TRAIN, TEST = 0, 2

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_KINDS = {"blob": "u", "off": "iu", "label": "iu", "split": "iu", "names": "U"}  # numpy's dtype.kind


def read(request: Request) -> Task:
    """The reader of `npz:FILE`."""
    return read_pack(request.path, request.decoding)


def read_pack(file: Path, decoding: Decoding = UPRIGHT_RGB) -> Task:
    """The images in `file`. The compressed bytes stay in memory, images are decoded on access.

    Raises:
        InputError: no such file, a missing array, or an array that is pickled or has another layout than above.
    """
    pack = _read_arrays(file)
    _check_layout(pack, file)
    blob, off = pack["blob"], pack["off"].astype(np.int64)

    def read(i: int) -> Picture:
        return decode(blob[off[i] : off[i + 1]].tobytes(), f"{file}: image {i}", decoding)

    images = ImageSet(pack["label"].astype(np.int64), read)
    classes = tuple(str(name).split(",")[0].replace("_", " ").strip() for name in pack["names"])
    train, test = (images.subset(np.flatnonzero(pack["split"] == split)) for split in (TRAIN, TEST))
    return Task(file.stem, classes, DEFAULT_TEMPLATES, train, test)


def _read_arrays(file: Path) -> dict[str, np.ndarray]:
    if not file.is_file():
        raise InputError(f"{file}: no such file", "use a .npz pack of images")
    try:
        with zipfile.ZipFile(file) as archive:
            missing = [key for key in _KINDS if f"{key}.npy" not in archive.namelist()]
            arrays = {} if missing else {key: _read_array(archive, f"{key}.npy") for key in _KINDS}
    except Exception as error:  # zipfile, zlib and numpy raise various exceptions for corrupted bytes
        raise InputError(
            f"{file}: not an .npz of plain arrays: {error}", "write it with numpy.savez; pickled objects are never read"
        ) from error
    if missing:
        raise InputError(
            f"{file}: no array {', '.join(missing)}", f"a pack of images has the arrays {', '.join(_KINDS)}"
        )
    return arrays


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array of an archive. Memory use depends on the actual bytes, never on the size claimed in a header.

    Raises ValueError for pickled objects, and for a header whose size differs from the archive's member.
    """
    member = archive.getinfo(name)
    with archive.open(member) as opened:
        read_header = _HEADERS[np.lib.format.read_magic(opened)]
        shape, fortran_order, dtype = read_header(opened)
        if dtype.hasobject:
            raise ValueError(f"{name} contains Python objects")
        size = math.prod(shape) * dtype.itemsize
        if opened.tell() + size != member.file_size:
            raise ValueError(f"{name} has {member.file_size} bytes, expected {opened.tell() + size} by its header")
        data = opened.read()
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C")


def _check_layout(pack: dict[str, np.ndarray], file: Path) -> None:
    count = pack["label"].size
    lengths = {"off": count + 1, "label": count, "split": count}
    for key, array in pack.items():
        if array.dtype.kind not in _KINDS[key] or array.shape != (lengths.get(key, array.size),):
            expected = {"u": "uint8", "iu": "integers", "U": "strings"}[_KINDS[key]]
            shape = f"({lengths[key]},)" if key in lengths else "one row"
            raise InputError(
                f"{file}: {key} is {array.dtype} {array.shape}, expected {expected} {shape}", "recreate the pack"
            )
    if pack["blob"].dtype != np.uint8:
        raise InputError(f"{file}: blob is {pack['blob'].dtype}, expected uint8", "recreate the pack")
    off = pack["off"].astype(np.int64)
    if off[0] < 0 or off[-1] > pack["blob"].size or (np.diff(off) < 0).any():
        raise InputError(
            f"{file}: off is not increasing within the {pack['blob'].size} bytes of blob", "recreate the pack"
        )
