"""An update as one flat file, `.r1u`: no archive, no compression.

    magic | u32 length | envelope JSON | u32 length | manifest JSON | zeros up to 64 | payload | end

Integers are little-endian. The whole file (64 MiB at most) is read into memory once, verified and installed from there, so
that concurrent changes of the file have no effect.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from r1export.errors import CheckFailed, InputError
from r1export.update import container
from r1export.update.atomic_io import read_regular
from r1export.update.envelope import MAX_ENVELOPE, PublicKey, describe, verify
from r1export.update.factors import ExpertUpdate, Factors
from r1export.update.manifest import MAX_MANIFEST, File, Manifest, Update, payload_regions
from r1export.update.rebuild import read_range

MAGIC = b"R1U\x01\r\n\x1a\n"  # as in PNG, it detects transfers that change line ends or strip the eighth bit
MAX_BUNDLE = 64 << 20  # bytes
HEAD_ALIGN = 64
REMEDY = "download the file again, or rebuild it"


@dataclass(frozen=True)
class Bundle:
    """A verified update in memory."""

    envelope: bytes
    manifest_bytes: bytes
    payload: memoryview
    manifest: Manifest
    signers: tuple[str, ...]

    @classmethod
    def parse(cls, data: bytes, trusted: Sequence[PublicKey], threshold: int = 1) -> Bundle:
        """Verify and read a bundle: signatures first, then the manifest, then the payload.

        Raises:
            InputError: malformed.
            CheckFailed: not signed by enough trusted keys, or the payload differs from the signed one.
            Unsupported: for a newer updater.
        """
        envelope, manifest_bytes, payload = split(data)
        signers = verify(envelope, manifest_bytes, trusted, threshold)
        manifest = Manifest.parse(manifest_bytes)
        _check_payload(manifest, payload)
        return cls(envelope, manifest_bytes, payload, manifest, signers)

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest's bytes: the identity of the update."""
        return hashlib.sha256(self.manifest_bytes).hexdigest()

    @property
    def slot(self) -> str:
        """Name of the version's folder on a device."""
        return f"{self.manifest.seq:08d}-{self.digest[:16]}"

    def to_bytes(self) -> bytes:
        """The file. `Bundle.parse(b.to_bytes(), keys).to_bytes() == b.to_bytes()`."""
        return assemble(self.envelope, self.manifest_bytes, self.payload)

    @cached_property
    def carried(self) -> dict[str, ExpertUpdate]:
        """The updates in this bundle by the digest of their factors.safetensors.

        Raises CheckFailed on a digest mismatch.
        """
        return {update.sha256: self._factors(update) for update in self.manifest.updates if update.experts}

    def content(self, file: File, base: Path) -> Iterator[bytes | memoryview]:
        """The bytes of a file that is made of parts. Raises InputError if the base's file is too short."""
        for part in file.parts or ():
            if part.source == "payload":
                yield self.payload[part.offset : part.offset + part.nbytes]
            else:
                yield from read_range(base / file.path, part.offset, part.nbytes)

    def _factors(self, update: Update) -> ExpertUpdate:
        dtype, payload = np.dtype(container.DTYPES[update.dtype]), np.frombuffer(self.payload, np.uint8)
        pairs = {}
        for experts in update.experts:
            shapes = ((experts.rows.stop - experts.rows.start, experts.k), (experts.k, experts.in_features))
            pairs[experts.rows] = Factors(
                *(
                    container.from_stored(payload[start : start + prod(shape) * dtype.itemsize], dtype).reshape(shape)
                    for start, shape in zip((experts.u, experts.v), shapes)
                )
            )
        factors = ExpertUpdate(pairs)
        if (found := hashlib.sha256(factors.to_bytes()).hexdigest()) != update.sha256:
            raise CheckFailed(f"the factors of {update.task} have SHA-256 {found}, expected {update.sha256}", REMEDY)
        return factors


def assemble(envelope: bytes, manifest: bytes, payload: bytes | memoryview) -> bytes:
    """The file's bytes."""
    head = MAGIC + b"".join(len(part).to_bytes(4, "little") + part for part in (envelope, manifest))
    return head + bytes(-len(head) % HEAD_ALIGN) + payload


def split(data: bytes) -> tuple[bytes, bytes, memoryview]:
    """Envelope, manifest and payload of a file's bytes, unverified. Raises InputError if the file is not a bundle."""
    if len(data) > MAX_BUNDLE:
        raise InputError(f"the update has more than {MAX_BUNDLE} bytes", REMEDY)
    if not data.startswith(MAGIC):
        raise InputError("not a .r1u file: wrong magic number in its first 8 bytes", REMEDY)
    parts, position = [], len(MAGIC)
    for limit, name in ((MAX_ENVELOPE, "envelope"), (MAX_MANIFEST, "manifest")):
        length = int.from_bytes(data[position : position + 4], "little")
        position += 4
        if length > limit or position + length > len(data):
            raise InputError(
                f"the {name} claims {length} bytes, expected at most {min(limit, max(0, len(data) - position))}",
                REMEDY,
            )
        parts.append(data[position : position + length])
        position += length
    start = position + -position % HEAD_ALIGN
    if start > len(data) or any(data[position:start]):
        raise InputError("the padding between manifest and payload is missing or not zero", REMEDY)
    return parts[0], parts[1], memoryview(data)[start:]


def read_bundle(path: Path) -> bytes:
    """The bytes of an update file, read once. Raises InputError if it is not a regular file or larger than 64 MiB."""
    try:
        return read_regular(path, MAX_BUNDLE)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no such file", "check the path") from None


def inspect(path: Path) -> dict[str, Any]:
    """Describe the update at `path`. Signatures are listed, not verified.

    Raises:
        InputError, Unsupported: malformed, or for a newer updater.
        CheckFailed: the payload differs from the manifest.
    """
    data = read_bundle(path)
    envelope, manifest_bytes, payload = split(data)
    manifest = Manifest.parse(manifest_bytes)
    _check_payload(manifest, payload)
    bundle = Bundle(envelope, manifest_bytes, payload, manifest, ())
    updates = [
        {"task": u.task, "sha256": u.sha256, "carried": bool(u.experts), "experts": sum(e.k for e in u.experts)}
        for u in manifest.updates
    ]
    return {
        "path": str(path),
        "bytes": len(data),
        "name": manifest.name,
        "product": manifest.product,
        "device_class": manifest.device_class,
        "seq": manifest.seq,
        "min_seq": manifest.min_seq,
        "created": manifest.created,
        "expires": manifest.expires or None,
        "algorithm": manifest.algorithm,
        "base": manifest.base.sha256,
        "slot": bundle.slot,
        "signed_by": describe(envelope),
        "updates": updates,
        "factors_bytes": sum(update.nbytes for update in bundle.carried.values()),
        "files": [{"path": file.path, "bytes": file.nbytes, "sha256": file.sha256} for file in manifest.files],
    }


def _check_payload(manifest: Manifest, payload: memoryview) -> None:
    if len(payload) != manifest.payload_bytes:
        raise CheckFailed(f"the payload has {len(payload)} bytes, expected {manifest.payload_bytes} as signed", REMEDY)
    if (found := hashlib.sha256(payload).hexdigest()) != manifest.payload_sha256:
        raise CheckFailed(f"the payload has SHA-256 {found}, expected {manifest.payload_sha256} as signed", REMEDY)
    end = 0
    for offset, nbytes, _ in payload_regions(manifest):
        if any(payload[end:offset]):
            raise InputError(f"the payload's padding at byte {end} is not zero", REMEDY)
        end = offset + nbytes
