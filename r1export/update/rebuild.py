"""The files of a version, derived again from the base: its bytes, with the merged tensors put where the base has theirs.

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
from r1export.update.factors import PROCEDURE, ExpertUpdate
from r1export.update.int8 import PROCEDURE_INT8, dequantize, quantize
from r1export.update.release_manifest import Release, Stored


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
        found = {}
        for parameter in self.update.parameters:
            found[parameter] = parameter
            if scale := self._stored(parameter).scale:
                found[scale] = parameter
        return found

    @property
    def procedure(self) -> str:
        """Name of the arithmetic that this rebuild needs."""
        quantised = any(self._stored(parameter).scale for parameter in self.update.parameters)
        return PROCEDURE_INT8 if quantised else PROCEDURE

    @cached_property
    def merged_files(self) -> dict[str, list[str]]:
        """The changed tensors of each weights file, in the order in which they lie in it. Raises InputError like `changed`."""
        files: dict[str, list[str]] = {}
        for name in sorted(self.changed, key=lambda name: self._stored(name).offset):
            files.setdefault(self._stored(name).file, []).append(name)
        return files

    def tensor(self, name: str) -> np.ndarray:
        """The merged tensor as it is stored: transposed where the base stores it transposed, quantised where it is quantised."""
        parameter = self.changed[name]
        stored = self._stored(parameter)
        weight = read_stored(self.base.path, stored)
        weight = weight.T if stored.transposed else weight
        if stored.scale:
            weight = dequantize(weight, read_stored(self.base.path, self._stored(stored.scale)))
        pairs = {rows: pair for rows, pair in self.update.factors.items() if rows.parameter == parameter}
        merged = ExpertUpdate(pairs).apply({parameter: weight})[parameter]
        if stored.scale:
            merged, scale = quantize(merged)
            if name == stored.scale:
                return scale
        return np.ascontiguousarray(merged.T if stored.transposed else merged)

    def chunks(self, path: str) -> Iterator[bytes | memoryview]:
        """The bytes of the version's file `path`, piece by piece. Raises InputError if the base's file is shorter than it says."""
        position = 0
        for parameter in self.merged_files.get(path, []):
            stored = self._stored(parameter)
            yield from read_range(self.base.path / path, position, stored.offset - position)
            yield self.tensor(parameter).reshape(-1).view(np.uint8).data
            position = stored.offset + stored.nbytes
        yield from read_range(self.base.path / path, position, self.base.files[path].nbytes - position)

    def _stored(self, parameter: str) -> Stored:
        if parameter not in self.base.tensors:
            raise InputError(
                f"the base release has no parameter {parameter}", "use the base that the update was made for"
            )
        return self.base.tensors[parameter]


def read_stored(folder: Path, stored: Stored) -> np.ndarray:
    """A parameter as it is stored, read with one call. Raises InputError if the file ends before it does."""
    data = b"".join(read_range(folder / stored.file, stored.offset, stored.nbytes))
    return np.frombuffer(data, stored.dtype).reshape(stored.shape)


def read_range(path: Path, offset: int, nbytes: int) -> Iterator[bytes]:
    """`nbytes` bytes of a file from `offset`, in pieces. Raises InputError if there are fewer."""
    if nbytes < 0:
        raise InputError(f"{path}: two tensors overlap", "the base is damaged: copy it from its release")
    with open_regular(path) as file:
        file.seek(offset)
        while nbytes:
            piece = file.read(min(nbytes, CHUNK))
            if not piece:
                raise InputError(f"{path} is {nbytes} bytes too short", "the base is damaged: copy it from its release")
            nbytes -= len(piece)
            yield piece
