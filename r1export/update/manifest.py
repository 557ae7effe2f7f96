"""The manifest of an update: the signed JSON of a bundle, parsed strictly into frozen values.

Laws: `Manifest.parse(m.to_bytes()) == m`; a parsed manifest describes a payload without gaps or overlaps, so readers need
no further checks. The format is described in docs/bundle-format.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from r1export.errors import InputError, Unsupported
from r1export.update.factors import PROCEDURE, Rows
from r1export.update.int8 import PROCEDURE_INT8
from r1export.update.names import NAME, PARAMETER, PATH, TEXT, check_paths
from r1export.update.release_layout import MANIFEST
from r1export.update.strict_json import REMEDY, Fields, items, matching, parse_json, whole, wrong

FORMAT = "r1export.bundle/1"
UPDATER = 1  # version of this updater; a manifest may require a later one
MAX_MANIFEST = 1 << 20  # bytes
MAX_PAYLOAD = 64 << 20  # bytes
ALIGN = 8  # alignment of every update and every part of a file
ITEMSIZE = {"F32": 4, "F16": 2}
PROCEDURES = {"fp32": PROCEDURE, "fp16": PROCEDURE, "int8": PROCEDURE_INT8}  # by precision

_DTYPE = re.compile("|".join(ITEMSIZE))
_SOURCE = re.compile("base|payload")


@dataclass(frozen=True)
class Base:
    """The immutable base that every version starts from: its tensors' digest and that of its manifest.json."""

    name: str
    sha256: str
    manifest: str


@dataclass(frozen=True)
class Experts:
    """k rank-1 experts of one adapted linear; `u` and `v` are offsets of (rows, k) and (k, in_features) in the payload."""

    rows: Rows
    in_features: int
    k: int
    u: int
    v: int


@dataclass(frozen=True)
class Update:
    """One task's experts. `sha256` is that of its factors.safetensors; without `experts` the device has to hold it already."""

    task: str
    sha256: str
    dtype: str = ""
    experts: tuple[Experts, ...] = ()


@dataclass(frozen=True)
class Part:
    """`nbytes` bytes from `offset` of the payload, or of the base's file of the same path."""

    source: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class File:
    """One file of the version: its parts one after the other, or (None) the base's file with the merged tensors put in."""

    path: str
    nbytes: int
    sha256: str
    parts: tuple[Part, ...] | None = None


@dataclass(frozen=True)
class Health:
    """Limits of the check on golden inputs: difference of embeddings, cosine, and share of equal top-1 answers."""

    max_abs: float
    min_cosine: float
    min_agreement: float


@dataclass(frozen=True)
class Manifest:
    """Everything that is signed. Times are seconds since 1970 UTC; `expires` 0 means never."""

    name: str
    product: str
    device_class: str
    seq: int
    min_seq: int
    created: int
    expires: int
    base: Base
    payload_bytes: int
    payload_sha256: str
    updates: tuple[Update, ...]
    tensors: dict[str, str]
    files: tuple[File, ...]
    health: Health
    evidence: dict[str, str]
    algorithm: str = PROCEDURE
    min_updater: int = UPDATER

    @property
    def nbytes(self) -> int:
        """Bytes of all files of the version."""
        return sum(file.nbytes for file in self.files)

    def to_bytes(self) -> bytes:
        """The JSON to be signed."""
        document: dict[str, Any] = {
            "format": FORMAT,
            "min_updater": self.min_updater,
            "name": self.name,
            "product": self.product,
            "device_class": self.device_class,
            "seq": self.seq,
            "min_seq": self.min_seq,
            "created": self.created,
            "expires": self.expires,
            "algorithm": self.algorithm,
            "base": {"name": self.base.name, "sha256": self.base.sha256, "manifest": self.base.manifest},
            "payload": {"bytes": self.payload_bytes, "sha256": self.payload_sha256},
            "updates": [_update_json(update) for update in self.updates],
            "tensors": self.tensors,
            "files": [_file_json(file) for file in self.files],
            "health": {
                "max_abs": self.health.max_abs,
                "min_cosine": self.health.min_cosine,
                "min_agreement": self.health.min_agreement,
            },
            "evidence": self.evidence,
        }
        return json.dumps(document, separators=(",", ":"), allow_nan=False).encode()

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """Inverse of `to_bytes`, for untrusted bytes.

        Raises:
            InputError: malformed, ambiguous or beyond a limit; the message names the member.
            Unsupported: well-formed, but for a newer updater or another algorithm.
        """
        fields = parse_json(data, "manifest", MAX_MANIFEST)
        algorithm = _known_algorithm(fields)
        seq = fields.integer("seq", 1)
        base, payload, health = fields.object("base"), fields.object("payload"), fields.object("health")
        manifest = cls(
            name=fields.text("name", NAME),
            product=fields.text("product", NAME),
            device_class=fields.text("device_class", NAME),
            seq=seq,
            min_seq=fields.integer("min_seq", 0, seq),
            created=fields.integer("created"),
            expires=fields.integer("expires"),
            base=Base(base.text("name", TEXT), base.digest("sha256"), base.digest("manifest")),
            payload_bytes=payload.integer("bytes", 0, MAX_PAYLOAD),
            payload_sha256=payload.digest("sha256"),
            updates=tuple(_update(item) for item in fields.records("updates", 1024)),
            tensors=fields.digests("tensors", PARAMETER, 65536),
            files=tuple(_file(item) for item in fields.records("files", 4096)),
            health=Health(
                health.number("max_abs", 0, 10),
                health.number("min_cosine", -1, 1),
                health.number("min_agreement", 0, 1),
            ),
            evidence=fields.digests("evidence", PATH, 16),
            algorithm=algorithm,
        )
        for part in (base, payload, health, fields):
            part.done()
        _check_files(manifest.files)
        _check_tensors(manifest)
        _check_payload(manifest)
        return manifest


def _known_algorithm(fields: Fields) -> str:
    form, updater, algorithm = (
        fields.text("format", TEXT),
        fields.integer("min_updater", 1),
        fields.text("algorithm", TEXT),
    )
    if form != FORMAT or updater > UPDATER or algorithm not in PROCEDURES.values():
        raise Unsupported(
            f"the update is {form}, for updater {updater}, algorithm {algorithm}; "
            f"this updater supports {FORMAT}, {UPDATER}, {', '.join(sorted({*PROCEDURES.values()}))}",
            "update the updater first",
        )
    return algorithm


def _update(fields: Fields) -> Update:
    task, sha256 = fields.text("task", NAME), fields.digest("sha256")
    if "experts" not in fields:
        fields.done()
        return Update(task, sha256)
    update = Update(
        task,
        sha256,
        fields.text("dtype", _DTYPE),
        tuple(_experts(item) for item in fields.records("experts", 16384)),
    )
    fields.done()
    if not update.experts:
        raise wrong(f"{fields.location}.experts", [], "at least one, or no such key")
    named = [experts.rows for experts in update.experts]
    for before, after in zip(named, named[1:]):
        if not before < after or (before.parameter == after.parameter and after.start < before.stop):
            raise InputError(
                f"{fields.location}: {after} after {before}", "experts must be sorted and must not overlap"
            )
    return update


def _experts(fields: Fields) -> Experts:
    parameter = fields.text("tensor", PARAMETER)
    rows = [whole(item, location, 0, 999_999_999) for item, location in fields.array("rows", 2)]
    if len(rows) != 2 or rows[0] >= rows[1]:
        raise wrong(f"{fields.location}.rows", rows, "start and stop, with start < stop")
    size = {"low": 1, "high": MAX_PAYLOAD}
    experts = Experts(
        Rows(parameter, *rows),
        fields.integer("in", **size),
        fields.integer("k", **size),
        fields.integer("u"),
        fields.integer("v"),
    )
    fields.done()
    return experts


def _file(fields: Fields) -> File:
    path, nbytes, sha256 = fields.text("path", PATH), fields.integer("bytes"), fields.digest("sha256")
    parts = (
        tuple(_part(item, location) for item, location in fields.array("parts", 4096)) if "parts" in fields else None
    )
    fields.done()
    if parts is not None and sum(part.nbytes for part in parts) != nbytes:
        raise InputError(f"{fields.location}: the parts of {path} don't add up to {nbytes} bytes", REMEDY)
    return File(path, nbytes, sha256, parts)


def _part(value: Any, location: str) -> Part:
    members = items(value, location, 3)
    if len(members) != 3:
        raise wrong(location, value, "[source, offset, bytes]")
    return Part(matching(*members[0], _SOURCE), whole(*members[1]), whole(*members[2], low=1))


def _check_files(files: tuple[File, ...]) -> None:
    """The file names don't conflict, and manifest.json is one of them."""
    check_paths([file.path for file in files], "manifest.files")
    if MANIFEST not in {file.path for file in files}:
        raise InputError(f"manifest.files: {MANIFEST} is missing", REMEDY)


def _check_tensors(manifest: Manifest) -> None:
    """A result digest for every merged parameter that this bundle carries, and none without any update."""
    named = {experts.rows.parameter for update in manifest.updates for experts in update.experts}
    if not named <= set(manifest.tensors) or (manifest.tensors and not manifest.updates):
        raise InputError("manifest.tensors: not the parameters that the updates change", REMEDY)
    if len({update.sha256 for update in manifest.updates}) != len(manifest.updates):
        raise InputError("manifest.updates: duplicate update", REMEDY)


def _check_payload(manifest: Manifest) -> None:
    """Offsets must follow from the sizes: anything else is a gap, an overlap or a misalignment."""
    end = 0
    for offset, nbytes, aligned in payload_regions(manifest):
        expected = end + (-end % ALIGN if aligned else 0)
        if offset != expected:
            raise InputError(f"manifest: payload offset {offset}, expected {expected}", REMEDY)
        end = offset + nbytes
    if end != manifest.payload_bytes:
        raise InputError(f"manifest: the payload has {manifest.payload_bytes} bytes, {end} are used", REMEDY)


def payload_regions(manifest: Manifest) -> Iterator[tuple[int, int, bool]]:
    """(offset, bytes, whether it starts at a multiple of ALIGN) of everything in the payload, in order."""
    for update in manifest.updates:
        size = ITEMSIZE[update.dtype] if update.dtype else 0
        for number, experts in enumerate(update.experts):
            yield experts.u, (experts.rows.stop - experts.rows.start) * experts.k * size, number == 0
            yield experts.v, experts.k * experts.in_features * size, False
    for file in manifest.files:
        for part in file.parts or ():
            if part.source == "payload":
                yield part.offset, part.nbytes, True


def _update_json(update: Update) -> dict[str, Any]:
    document: dict[str, Any] = {"task": update.task, "sha256": update.sha256}
    if update.experts:
        experts = [
            {
                "tensor": e.rows.parameter,
                "rows": [e.rows.start, e.rows.stop],
                "in": e.in_features,
                "k": e.k,
                "u": e.u,
                "v": e.v,
            }
            for e in update.experts
        ]
        document.update({"dtype": update.dtype, "experts": experts})
    return document


def _file_json(file: File) -> dict[str, Any]:
    document: dict[str, Any] = {"path": file.path, "bytes": file.nbytes, "sha256": file.sha256}
    if file.parts is not None:
        document["parts"] = [[part.source, part.offset, part.nbytes] for part in file.parts]
    return document
