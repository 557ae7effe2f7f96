"""The files of a version, derived from the base: its bytes, with the merged tensors in their places.

One tensor is in memory at a time, so a device needs little more than its largest adapted weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from r1export.errors import InputError
from r1export.update.atomic_io import CHUNK, open_regular
from r1export.update.container import from_stored, stored_bytes
from r1export.update.factors import PROCEDURE, ExpertUpdate
from r1export.update.int8 import PROCEDURE_INT8, dequantize, quantize
from r1export.update.release_manifest import Release, TensorEntry


@dataclass(frozen=True)
class Rebuild:
    """The base release together with the experts to merge into it."""

    base: Release
    update: ExpertUpdate

    @cached_property
    def changed(self) -> dict[str, str]:
        """Every tensor that differs from the base, and the adapted parameter it follows from: itself, or the one it scales.

        Raises InputError if the base has no such parameter.
        """
        sources = {}
        for parameter in self.update.parameters:
            sources[parameter] = parameter
            if scale := self._entry(parameter).scale:
                sources[scale] = parameter
        return sources

    @property
    def procedure(self) -> str:
        """Name of the arithmetic that this rebuild needs."""
        quantised = any(self._entry(parameter).scale for parameter in self.update.parameters)
        return PROCEDURE_INT8 if quantised else PROCEDURE

    @cached_property
    def merged_files(self) -> dict[str, list[str]]:
        """The changed tensors of each weights file, in the order in which they lie in it. Raises InputError like `changed`."""
        files: dict[str, list[str]] = {}
        for name in sorted(self.changed, key=lambda name: self._entry(name).offset):
            files.setdefault(self._entry(name).file, []).append(name)
        return files

    def tensor(self, name: str) -> np.ndarray:
        """The merged tensor as it is stored: transposed where the base stores it transposed, quantised where it is quantised."""
        parameter = self.changed[name]
        entry = self._entry(parameter)
        weight = read_stored(self.base.path, entry)
        weight = weight.T if entry.transposed else weight
        if entry.scale:
            weight = dequantize(weight, read_stored(self.base.path, self._entry(entry.scale)))
        pairs = {rows: pair for rows, pair in self.update.factors.items() if rows.parameter == parameter}
        merged = ExpertUpdate(pairs).apply({parameter: weight})[parameter]
        if entry.scale:
            merged, scale = quantize(merged)
            if name == entry.scale:
                return scale
        return np.ascontiguousarray(merged.T if entry.transposed else merged)

    def chunks(self, path: str) -> Iterator[bytes | memoryview]:
        """The bytes of the version's file `path`, piece by piece. Raises InputError if the base's file is shorter than it says."""
        return (piece for _, piece in self.pieces(path))

    def pieces(self, path: str) -> Iterator[tuple[str, bytes | memoryview]]:
        """`chunks`, a merged tensor in one piece together with its name; what is the base's has none."""
        position = 0
        for name in self.merged_files.get(path, []):
            entry = self._entry(name)
            for piece in read_range(self.base.path / path, position, entry.offset - position):
                yield "", piece
            yield name, stored_bytes(self.tensor(name))
            position = entry.end
        for piece in read_range(self.base.path / path, position, self.base.manifest.files[path].nbytes - position):
            yield "", piece

    def _entry(self, parameter: str) -> TensorEntry:
        if parameter not in self.base.manifest.tensors:
            raise InputError(f"the base release has no parameter {parameter}", "use the base of the update")
        return self.base.manifest.tensors[parameter]


def read_stored(folder: Path, entry: TensorEntry) -> np.ndarray:
    """A parameter as it is stored, read with one call. Raises InputError if the file ends before it does."""
    data = b"".join(read_range(folder / entry.file, entry.offset, entry.nbytes))
    return from_stored(np.frombuffer(data, np.uint8), entry.dtype).reshape(entry.shape)


def read_range(path: Path, offset: int, nbytes: int) -> Iterator[bytes]:
    """`nbytes` bytes of a file from `offset`, in pieces. Raises InputError if there are fewer."""
    if nbytes < 0:
        raise InputError(f"{path}: two tensors overlap", "the base is corrupted: copy it from its release")
    with open_regular(path) as file:
        file.seek(offset)
        while nbytes:
            piece = file.read(min(nbytes, CHUNK))
            if not piece:
                raise InputError(
                    f"{path} is {nbytes} bytes too short", "the base is corrupted: copy it from its release"
                )
            nbytes -= len(piece)
            yield piece
