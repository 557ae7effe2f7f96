"""The safetensors container, read and written with numpy alone, so that a device needs nothing else.

    u64 length | JSON header {name: {dtype, shape, data_offsets}} padded with spaces to 8 | tensors, contiguous

Writing is canonical: tensors in the given order, no metadata, so equal tensors give equal bytes. Reading is strict: gaps,
overlaps, duplicate keys and trailing bytes are errors.
Format: https://huggingface.co/docs/safetensors (the safetensors library is the oracle in the tests).
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from r1export.errors import InputError
from r1export.update.atomic_io import open_regular, write_file
from r1export.update.strict_json import Fields, parse_json, whole, wrong

DTYPES = {  # in memory, in the byte order of the machine
    "F64": "f8",
    "F32": "f4",
    "F16": "f2",
    "I64": "i8",
    "I32": "i4",
    "I16": "i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
}
NAMES = {np.dtype(code): name for name, code in DTYPES.items()}
MAX_AXES, MAX_ELEMENTS = 32, 1 << 48  # of one tensor: numpy can make an array of every such shape, even of no bytes
_DTYPE = re.compile("|".join(DTYPES))
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library


@dataclass(frozen=True)
class TensorSpec:
    """The location of one tensor; `offset` counts from the start of the file."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Length of the tensor in the file."""
        return self.dtype.itemsize * prod(self.shape)

    @property
    def end(self) -> int:
        """Where the next tensor begins."""
        return self.offset + self.nbytes


@dataclass(frozen=True)
class Layout:
    """The header of a container: everything about the tensors except their values."""

    header: bytes
    specs: tuple[TensorSpec, ...]

    @cached_property
    def by_name(self) -> dict[str, TensorSpec]:
        return {spec.name: spec for spec in self.specs}

    @property
    def nbytes(self) -> int:
        """Length of the whole file in bytes."""
        return self.specs[-1].end if self.specs else len(self.header)


def plan(tensors: Iterable[tuple[str, np.dtype[Any], tuple[int, ...]]]) -> Layout:
    """Lay out tensors contiguously in the given order; wide dtypes should come first to stay aligned."""
    specs: dict[str, TensorSpec] = {}
    end = 0
    for name, dtype, shape in tensors:
        specs[name] = TensorSpec(name, np.dtype(dtype), tuple(shape), end)
        end = specs[name].end
    text = json.dumps({name: _entry(spec) for name, spec in specs.items()}, separators=(",", ":"), ensure_ascii=False)
    header = text.encode()
    header += b" " * (-len(header) % 8)
    header = len(header).to_bytes(8, "little") + header
    return Layout(header, tuple(replace(spec, offset=len(header) + spec.offset) for spec in specs.values()))


def _entry(spec: TensorSpec) -> dict[str, object]:
    return {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [spec.offset, spec.end]}


def write_layout(path: Path, layout: Layout, tensor_of: Callable[[TensorSpec], np.ndarray]) -> None:
    """Write a container atomically, requesting one tensor at a time, so that only one is in memory.

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
            yield stored_bytes(tensor)

    write_file(path, chunks())


def stored_bytes(tensor: np.ndarray) -> memoryview:
    """The bytes of a tensor as a file holds them, little-endian: where the machine is so too, the tensor's own."""
    return np.ascontiguousarray(tensor, tensor.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data


def from_stored(data: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Inverse of `stored_bytes`, for bytes (n,) in uint8: values (m,), a view of them where the machine is little-endian."""
    return data.view(dtype.newbyteorder("<")).astype(dtype, copy=False)


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
    except (ValueError, InputError) as error:
        message = error.message if isinstance(error, InputError) else str(error)
        raise InputError(
            f"{path}: invalid safetensors file: {message}", "recreate or download the file again"
        ) from error


def _parse(header: bytes, size: int) -> Layout:
    fields = parse_json(header[8:], "header", MAX_HEADER)
    if "__metadata__" in fields:
        fields.take("__metadata__")
    specs = sorted((_spec(name, fields.object(name), len(header)) for name in fields), key=lambda s: (s.offset, s.end))
    end = len(header)
    for spec in specs:
        if spec.offset != end:
            raise ValueError(f"{ascii(spec.name)[:100]}: gap or overlap at byte {end}")
        end = spec.end
    if end != size:
        raise ValueError(f"{size} bytes, expected {end}")
    return Layout(header, tuple(specs))


def _spec(name: str, entry: Fields, data_start: int) -> TensorSpec:
    offsets = [whole(end, location) for end, location in entry.array("data_offsets", 2)]
    spec = TensorSpec(name, take_dtype(entry), take_shape(entry), data_start + (offsets[0] if offsets else 0))
    if [spec.offset, spec.end] != [data_start + end for end in offsets]:
        raise ValueError(f"{ascii(name)[:100]}: gap, overlap or wrong length in data_offsets {offsets}")
    return spec


def take_dtype(entry: Fields) -> np.dtype[Any]:
    """The type that the member `dtype` names. Raises InputError for an unknown one."""
    return np.dtype(DTYPES[entry.text("dtype", _DTYPE)])


def take_shape(entry: Fields, name: str = "shape") -> tuple[int, ...]:
    """The shape in the member `name`. Raises InputError if numpy could not make an array of it, even of no bytes."""
    shape = tuple(whole(size, location) for size, location in entry.array(name, MAX_AXES))
    if prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        raise wrong(f"{entry.location}.{name}", shape, f"at most {MAX_ELEMENTS} elements")
    return shape


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
        s.name: np.asarray(from_stored(data[s.offset : s.offset + s.nbytes], s.dtype)).reshape(s.shape)
        for s in layout.specs
    }


def digest(weights: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors, sorted by name."""
    sha = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name]
        sha.update(f"{name}\0{tensor.dtype.str}\0{tensor.shape}\0".encode())
        sha.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
    return sha.hexdigest()
