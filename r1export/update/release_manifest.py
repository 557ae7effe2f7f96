"""A release folder as its manifest.json describes it: what is in it, with digests, and where each parameter lies."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from r1export.errors import CheckFailed, InputError
from r1export.update.atomic_io import sha256_bytes, sha256_file
from r1export.update.container import DTYPES
from r1export.update.strict_json import Fields, items, parse_json, whole

FORMAT = "r1export.release/1"
MANIFEST = "manifest.json"
REPORTS = (
    "report.html",
    "report.md",
    "report.xml",
    "report.json",
)  # written in this order once the release is verified
MAX_MANIFEST = 64 << 20  # bytes; 300 parameters need about 100 kB
_ANY = re.compile(r"(?s).{1,1000}")
_PATH = re.compile(r"(?!.*(^|/)\.\.?(/|$))[^/\\\0][^\\\0]{0,999}")


@dataclass(frozen=True)
class Stored:
    """Where a parameter lies: `shape` as stored; `transposed` if that is the (in, out) of an (out, in) weight.

    An int8 parameter names another one that holds the float32 scale of each of its rows.
    """

    file: str
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    transposed: bool
    sha256: str
    scale: str = ""

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * prod(self.shape)


@dataclass(frozen=True)
class FileEntry:
    """Digest and length of one file."""

    sha256: str
    nbytes: int


@dataclass(frozen=True)
class Release:
    """One deployable version on disk. `updates` are (task, sha256 of factors.safetensors) in the order of merging."""

    path: Path
    name: str
    sequence: int
    procedure: str
    precision: str
    base_name: str
    base_sha256: str
    updates: tuple[tuple[str, str], ...]
    files: Mapping[str, FileEntry]
    tensors: Mapping[str, Stored]
    golden: Mapping[str, float]

    @classmethod
    def read(cls, path: Path) -> Release:
        """Read PATH/manifest.json. Raises InputError if it is missing or not a release's."""
        try:
            data = (path / MANIFEST).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{path} is no release: it has no {MANIFEST}", "give a folder of RUN/releases") from None
        fields = parse_json(data, str(path / MANIFEST), MAX_MANIFEST)
        if (form := fields.text("format", _ANY)) != FORMAT:
            raise InputError(
                f"{path / MANIFEST}: format {form!r}, expected {FORMAT!r}", "export it again with this version"
            )
        base, golden = fields.object("base"), fields.object("golden")
        return cls(
            path=path,
            name=fields.text("name", _ANY),
            sequence=fields.integer("sequence"),
            procedure=fields.text("procedure", _ANY),
            precision=fields.text("precision", _ANY),
            base_name=base.text("name", _ANY),
            base_sha256=base.digest("sha256"),
            updates=tuple((item.text("task", _ANY), item.digest("sha256")) for item in _objects(fields, "updates")),
            files={
                name: FileEntry(item.digest("sha256"), item.integer("bytes"))
                for name, item in _members(fields, "files")
            },
            tensors={name: _stored(item) for name, item in _members(fields, "tensors")},
            golden={name: golden.number(name, -1, 10) for name in ("max_abs", "min_cosine")},
        )

    @cached_property
    def manifest_sha256(self) -> str:
        """Digest of manifest.json, and with it of everything else."""
        return sha256_file(self.path / MANIFEST)

    @property
    def weights(self) -> frozenset[str]:
        """The files in which parameters lie."""
        return frozenset(stored.file for stored in self.tensors.values())

    def check(self) -> None:
        """Hash every file. Raises CheckFailed naming the first that is missing or not as the manifest says."""
        for name, entry in self.files.items():
            check_file(self.path / name, entry.sha256)


def is_graph(path: str) -> bool:
    """Whether the file is one of the graphs, which all releases of a base share."""
    return path.casefold().endswith(".onnx")


def check_file(path: Path, sha256: str) -> None:
    """Raises CheckFailed if the file at `path` is missing or has another digest."""
    if not path.is_file():
        raise CheckFailed(f"{path} is missing", "copy it from the release it belongs to")
    if (found := sha256_file(path)) != sha256:
        raise CheckFailed(
            f"{path} is damaged: SHA-256 {found}, expected {sha256}", "copy it from the release it belongs to"
        )


def _members(fields: Fields, name: str) -> list[tuple[str, Fields]]:
    members = fields.object(name)
    for key in members:
        if not _PATH.fullmatch(key):
            raise InputError(f"{members.place}: name {ascii(key)[:80]}", "export it again with this version")
    return [(key, members.object(key)) for key in members]


def _objects(fields: Fields, name: str) -> list[Fields]:
    return [Fields(value, place) for value, place in fields.array(name, 100_000)]


def _stored(fields: Fields) -> Stored:
    dtype = fields.text("dtype", _ANY)
    shape = tuple(whole(value, place) for value, place in items(fields.take("shape"), f"{fields.place}.shape", 8))
    if dtype not in DTYPES:
        raise InputError(f"{fields.place}.dtype: {dtype}", "export it again with this version")
    return Stored(
        file=fields.text("file", _PATH),
        offset=fields.integer("offset"),
        dtype=np.dtype(DTYPES[dtype]),
        shape=shape,
        transposed=fields.take("transposed") is True,
        sha256=fields.digest("sha256"),
        scale=fields.text("scale", _PATH) if "scale" in fields else "",
    )


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content without its own `sha256`, whatever the order of its keys."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return sha256_bytes(json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with its digest of itself, so that an edited one is noticed. A signed update vouches for who wrote it."""
    return {**manifest, "sha256": manifest_digest(manifest)}
