"""The safetensors container, read and written with numpy alone, so that a device needs nothing else.

    u64 length | JSON header {name: {dtype, shape, data_offsets}} padded with spaces to 8 | tensors, contiguous

Writing is canonical: tensors in the given order, no metadata, so equal tensors give equal bytes. Reading is strict:
what another writer could hide (gaps, overlaps, duplicate keys, trailing bytes) is refused.
Format: https://huggingface.co/docs/safetensors (the safetensors library is the oracle in the tests).
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from r1export.errors import InputError
from r1export.update.atomic_io import open_regular, write_file
from r1export.update.strict_json import no_duplicates

DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U8": "|u1",
    "BOOL": "|b1",
}
NAMES = {np.dtype(code): name for name, code in DTYPES.items()}
MAX_AXES, MAX_ELEMENTS = 32, 1 << 48  # of one tensor: numpy can make an array of every such shape, even of no bytes
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library


@dataclass(frozen=True)
class TensorSpec:
    """Where one tensor lies: `offset` counts from the start of the file, `nbytes` is its length."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """The header of a container: everything about the tensors but their values."""

    header: bytes
    specs: tuple[TensorSpec, ...]

    @cached_property
    def by_name(self) -> dict[str, TensorSpec]:
        return {spec.name: spec for spec in self.specs}

    @property
    def nbytes(self) -> int:
        """Length of the whole file in bytes."""
        return self.specs[-1].offset + self.specs[-1].nbytes if self.specs else len(self.header)


def plan(tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]]) -> Layout:
    """Lay tensors out one after the other, in the given order; widest dtypes should come first to stay aligned."""
    entries: dict[str, dict[str, Any]] = {}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + np.dtype(dtype).itemsize * prod(shape)
        entries[name] = {"dtype": NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return Layout(header, tuple(_spec(name, entry, len(header)) for name, entry in entries.items()))


def _spec(name: str, entry: Mapping[str, Any], data_start: int) -> TensorSpec:
    start, end = entry["data_offsets"]
    if any(type(n) is not int or not 0 <= n <= MAX_ELEMENTS for n in (start, end, *entry["shape"])):
        raise ValueError(f"{ascii(name)[:100]}: an offset or a size is no whole number from 0 to {MAX_ELEMENTS}")
    if len(entry["shape"]) > MAX_AXES or prod(max(n, 1) for n in entry["shape"]) > MAX_ELEMENTS:
        raise ValueError(f"{ascii(name)[:100]}: more than {MAX_AXES} axes or {MAX_ELEMENTS} elements")
    return TensorSpec(name, np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"]), data_start + start, end - start)


def write_layout(path: Path, layout: Layout, tensor_of: Callable[[TensorSpec], np.ndarray]) -> None:
    """Write a container atomically, asking for one tensor at a time, so that only one is in memory.

    Raises:
        ValueError: a tensor has not the dtype or shape that the layout promises.
        OSError: no space or no permission; nothing is left behind.
    """

    def chunks() -> Iterator[bytes | memoryview]:
        yield layout.header
        for spec in layout.specs:
            tensor = tensor_of(spec)
            if tensor.dtype != spec.dtype or tensor.shape != spec.shape:
                raise ValueError(
                    f"{spec.name}: {tensor.dtype}{list(tensor.shape)}, expected {spec.dtype}{list(spec.shape)}"
                )
            yield np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data

    write_file(path, chunks())


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write `tensors` in their order."""
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    layout = plan((name, array.dtype, array.shape) for name, array in arrays.items())
    write_layout(path, layout, lambda spec: arrays[spec.name])


def read_layout(path: Path) -> Layout:
    """Read and check a container's header.

    Raises:
        InputError: not a safetensors file, or one whose tensors overlap, leave gaps or do not end with the file.
    """
    with _open(path) as file:
        return _read_layout(file, path)


def _open(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", "check the path") from None


def _read_layout(file: BinaryIO, path: Path) -> Layout:
    """The layout of an open file, or of bytes in memory; `path` names it in errors. The file's position is moved."""
    try:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, MAX_HEADER):
            raise ValueError("the header is longer than the file")
        return _parse(prefix + file.read(length), size)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path}: not a well-formed safetensors file: {error}", "write or fetch the file again"
        ) from error


def _parse(header: bytes, size: int) -> Layout:
    entries = json.loads(header[8:].decode(), object_pairs_hook=no_duplicates)
    json.dumps(list(entries), ensure_ascii=False).encode()  # half a surrogate pair is no name: nothing could print it
    entries.pop("__metadata__", None)
    specs = sorted(
        (_spec(name, entry, len(header)) for name, entry in entries.items()), key=lambda s: (s.offset, s.nbytes)
    )
    end = len(header)
    for spec in specs:
        if spec.offset != end or spec.nbytes != spec.dtype.itemsize * prod(spec.shape):
            raise ValueError(f"{spec.name}: gap, overlap or wrong length at byte {end}")
        end += spec.nbytes
    if end != size:
        raise ValueError(f"{size} bytes, expected {end}")
    return Layout(header, tuple(specs))


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a container as read-only views of the file: nothing is read until it is used. Raises like `read_layout`."""
    with _open(path) as file:
        layout = _read_layout(file, path)
        empty = layout.nbytes == len(layout.header)  # a region of no bytes cannot be mapped
        data = np.zeros(0, np.uint8) if empty else np.memmap(file, np.uint8, "r")
    return _views(layout, data)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a container, copied into memory. Raises like `read_layout`."""
    return {name: np.array(tensor) for name, tensor in map_tensors(path).items()}


def parse_tensors(data: bytes, path: Path) -> dict[str, np.ndarray]:
    """The tensors in the bytes of a container, as read-only views of them; `path` names it in errors. Raises like `read_layout`."""
    return _views(_read_layout(io.BytesIO(data), path), np.frombuffer(data, np.uint8))


def _views(layout: Layout, data: np.ndarray) -> dict[str, np.ndarray]:
    return {
        s.name: np.asarray(data[s.offset : s.offset + s.nbytes].view(s.dtype)).reshape(s.shape) for s in layout.specs
    }
