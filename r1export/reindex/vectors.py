"""Files of stored vectors: .npy with a JSON file, or .parquet; both name their embedding space."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from r1export.errors import InputError, Unsupported, first_line
from r1export.update.atomic_io import read_regular, write_file, write_json
from r1export.update.embedding_space import EmbeddingSpace
from r1export.update.names import DIGEST, NAME, PRINTABLE
from r1export.update.strict_json import parse_json

if TYPE_CHECKING:
    import pyarrow

FORMAT = "r1export.vectors/1"
FORMATS = (".npy", ".parquet")
MAX_DESCRIPTION = 1 << 30  # bytes; a million paths need some 100 MB
ROWS = 4096  # written at a time
MAX_ROWS = 1 << 31


class Rows(Protocol):
    """Rows of vectors, of which some are read at a time: an array, also one that is mapped from a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __getitem__(self, rows: Any, /) -> np.ndarray: ...


@dataclass(frozen=True)
class VectorInfo:
    """What a file of vectors says: the release and the embedding space they are of, the path of the picture of each row, and
    why other pictures have no row.

    `kept` maps the image digest of an earlier space to the number of rows that were taken over from it.
    """

    release: str
    manifest_sha256: str
    space: EmbeddingSpace
    paths: Sequence[str]
    skipped: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "release": self.release,
            "manifest_sha256": self.manifest_sha256,
            "embedding_space": self.space.to_json(),
            "kept": dict(self.kept),
            "skipped": dict(self.skipped),
            "paths": list(self.paths),
        }

    @classmethod
    def parse(cls, data: bytes, location: str) -> VectorInfo:
        """Inverse of `to_json`. Raises InputError."""
        fields = parse_json(data, location, MAX_DESCRIPTION)
        if (form := fields.text("format", PRINTABLE)) != FORMAT:
            raise InputError(f"{location}: format {form!r}, expected {FORMAT!r}", "create it with r1export reindex")
        kept, skipped = fields.object("kept"), fields.object("skipped")
        return cls(
            release=fields.text("release", NAME),
            manifest_sha256=fields.digest("manifest_sha256"),
            space=EmbeddingSpace.of_members(fields.digests("embedding_space", NAME, 3), location),
            kept={name: kept.integer(name) for name in kept.names(DIGEST, 1000)},
            skipped={name: skipped.text(name, PRINTABLE) for name in skipped},
            paths=[str(path) for path, _ in fields.array("paths", MAX_ROWS)],
        )


@dataclass(frozen=True)
class Vectors:
    """Stored vectors: float32 (n, D), of which only what is used is read, and what the file says of them."""

    values: np.ndarray
    info: VectorInfo


def description_of(path: Path) -> Path:
    """The JSON file of a .npy."""
    return path.with_name(f"{path.name}.json")


def check_format(path: Path) -> None:
    """Raises InputError for another suffix, Unsupported where the library for it is missing."""
    if path.suffix not in FORMATS:
        raise InputError(f"{path}: unsupported suffix {path.suffix or '(none)'}", f"use {' or '.join(FORMATS)}")
    if path.suffix == ".parquet":
        _pyarrow()


def read_vectors(path: Path) -> Vectors:
    """Read a file that `write_vectors` wrote. Raises InputError: none, damaged; Unsupported: pyarrow is missing."""
    check_format(path)
    try:
        if path.suffix == ".npy":
            values = np.load(path, mmap_mode="r", allow_pickle=False)
            info = VectorInfo.parse(read_regular(description_of(path), MAX_DESCRIPTION), str(description_of(path)))
        else:
            values, info = _read_parquet(path)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path}: not a file of r1export vectors: {first_line(error)}", "create it with r1export reindex"
        ) from error
    if values.ndim != 2 or values.dtype != np.float32 or len(values) != len(info.paths):
        raise InputError(f"{path}: {values.dtype} {values.shape} for {len(info.paths)} paths", "recreate the file")
    return Vectors(values, info)


def write_vectors(path: Path, values: Rows, rows: np.ndarray, info: VectorInfo) -> None:
    """Write `values[rows]` atomically, `ROWS` at a time; `values` (n, D) may be a file that is mapped.

    Raises OSError: no space. A .npy is there only once its description is.
    """
    if path.suffix == ".npy":
        write_json(description_of(path), info.to_json())
        write_file(path, _npy(values, rows))
    else:
        _write_parquet(path, values, rows, info)


def _npy(values: Rows, rows: np.ndarray) -> Iterator[bytes]:
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(rows), values.shape[1])}
    yield np.lib.format.magic(1, 0)
    text = repr(header).encode() + b" " * (-(len(repr(header)) + 11) % 64) + b"\n"
    yield len(text).to_bytes(2, "little") + text
    for start in range(0, len(rows), ROWS):
        yield np.ascontiguousarray(values[rows[start : start + ROWS]], "<f4").tobytes()


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise Unsupported(
            ".parquet needs pyarrow, which is not installed", "pip install 'r1export[search]', or use .npy"
        ) from None
    return pyarrow


def _read_parquet(path: Path) -> tuple[np.ndarray, VectorInfo]:
    arrow = _pyarrow()
    table: pyarrow.Table = arrow.parquet.read_table(path)
    metadata = table.schema.metadata or {}
    document = json.loads(metadata[FORMAT.encode()]) | {"paths": table["path"].to_pylist()}
    column = table["vector"].combine_chunks()
    values = column.flatten().to_numpy().reshape(len(table), column.type.list_size)
    return values, VectorInfo.parse(json.dumps(document).encode(), str(path))


def _write_parquet(path: Path, values: Rows, rows: np.ndarray, info: VectorInfo) -> None:
    arrow = _pyarrow()
    document = {name: value for name, value in info.to_json().items() if name != "paths"}
    vector = arrow.list_(arrow.float32(), values.shape[1])
    schema = arrow.schema([("path", arrow.string()), ("vector", vector)]).with_metadata(
        {FORMAT: json.dumps(document, ensure_ascii=False)}
    )
    partial = path.with_name(f".{path.name}.partial")
    try:
        with arrow.parquet.ParquetWriter(partial, schema) as writer:
            for start in range(0, len(rows), ROWS):
                part = np.ascontiguousarray(values[rows[start : start + ROWS]], np.float32)
                vectors = arrow.FixedSizeListArray.from_arrays(arrow.array(part.reshape(-1)), part.shape[1])
                names = arrow.array(info.paths[start : start + ROWS], arrow.string())
                writer.write_table(arrow.Table.from_arrays([names, vectors], schema=schema))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
