"""layout.json: the contents of a client layout and its release, so that updates can be applied to it.

Devices read and write it, so this module needs only the standard library. The format is described in docs/layouts.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from r1export.errors import InputError
from r1export.update.atomic_io import json_bytes, read_regular, write_file
from r1export.update.embedding_space import EmbeddingSpace
from r1export.update.names import NAME, PATH, check_paths
from r1export.update.strict_json import parse_json

FORMAT = "r1export.layout/1"
LAYOUT = "layout.json"
MAX_BYTES, MAX_FILES = 1 << 20, 4096
_KIND = re.compile("release|update")


@dataclass(frozen=True)
class Origin:
    """The origin of a layout's weights: a release, by its manifest.json, or an update, by its signed manifest."""

    kind: str
    name: str
    sha256: str


@dataclass(frozen=True)
class LayoutFile:
    """`files`: path in the folder -> path of the same bytes in the release. `made`: path -> SHA-256 of what was written for
    the client and does not depend on the weights. `converted`: path -> SHA-256 of what follows from all weights.

    `variants` are the releases in other precisions that further files come from: precision -> path in the folder -> path in
    that release. `max_abs` is how far embeddings may be from the golden ones.
    """

    layout: str
    origin: Origin
    files: Mapping[str, str]
    made: Mapping[str, str]
    max_abs: float
    converted: Mapping[str, str] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    embedding_space: EmbeddingSpace | None = None

    def to_bytes(self) -> bytes:
        """The bytes of layout.json."""
        document = {
            "format": FORMAT,
            "layout": self.layout,
            "origin": {"kind": self.origin.kind, "name": self.origin.name, "manifest_sha256": self.origin.sha256},
            "files": dict(self.files),
            "made": dict(self.made),
            "max_abs": self.max_abs,
            "converted": dict(self.converted),
            "variants": {name: dict(files) for name, files in self.variants.items()},
        }
        if self.embedding_space:
            document["embedding_space"] = self.embedding_space.to_json()
        return json_bytes(document)

    def write(self, folder: Path) -> None:
        """Write FOLDER/layout.json. Raises OSError."""
        write_file(folder / LAYOUT, self.to_bytes())

    @classmethod
    def read(cls, folder: Path) -> LayoutFile:
        """Read FOLDER/layout.json. Raises InputError if it is missing, malformed, or names files outside of the folder."""
        try:
            data = read_regular(folder / LAYOUT, MAX_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                f"{folder} is not a layout: it has no {LAYOUT}", "create one with `r1export layout`"
            ) from None
        return cls.parse(data, str(folder / LAYOUT))

    @classmethod
    def parse(cls, data: bytes, location: str) -> LayoutFile:
        """Inverse of `to_bytes`, for untrusted bytes. Raises InputError."""
        fields = parse_json(data, location, MAX_BYTES)
        if (form := fields.text("format", re.compile("[a-z0-9./]{1,40}"))) != FORMAT:
            raise InputError(f"{location}: format {form!r}, expected {FORMAT!r}", "recreate the layout")
        origin, variants = fields.object("origin"), fields.objects("variants", NAME, 8)
        layout = cls(
            layout=fields.text("layout", NAME),
            origin=Origin(origin.text("kind", _KIND), origin.text("name", NAME), origin.digest("manifest_sha256")),
            files=fields.texts("files", PATH, PATH, MAX_FILES),
            made=fields.digests("made", PATH, MAX_FILES),
            max_abs=fields.number("max_abs", 0, 10),
            converted=fields.digests("converted", PATH, MAX_FILES),
            variants={
                name: {path: item.text(path, PATH) for path in item.names(PATH, MAX_FILES)}
                for name, item in variants.items()
            },
            embedding_space=EmbeddingSpace.of_members(
                fields.digests("embedding_space", NAME, 3), f"{location}.embedding_space"
            )
            if "embedding_space" in fields
            else None,
        )
        origin.done()
        fields.done()
        check_paths([*layout.paths, LAYOUT], location)
        return layout

    @property
    def paths(self) -> tuple[str, ...]:
        """All files of the folder but layout.json."""
        others = (path for files in self.variants.values() for path in files)
        return (*self.files, *self.made, *self.converted, *others)
