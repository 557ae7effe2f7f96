"""Check a release against a signed update, so that its own manifest need not be trusted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from r1export.errors import CheckFailed, InputError
from r1export.update.atomic_io import sha256_file
from r1export.update.bundle import Bundle, read_bundle
from r1export.update.envelope import PublicKey
from r1export.update.manifest import Manifest
from r1export.verify.results import Check


@dataclass(frozen=True)
class SignedUpdate:
    """The bytes of a .r1u file, the trusted keys, and how many of them must have signed it."""

    data: bytes
    trusted: tuple[PublicKey, ...]
    threshold: int = 1

    @classmethod
    def read(cls, update: Path, trust: Sequence[Path], threshold: int = 1) -> SignedUpdate:
        """Raises InputError if a file is unreadable, or `threshold` exceeds the number of keys."""
        trusted = tuple(dict.fromkeys(PublicKey.read(path) for path in trust))
        if not 1 <= threshold <= len(trusted):
            raise InputError(
                f"{threshold} signatures required from {len(trusted)} keys",
                "pass the fleet's public keys with --trust, and a --threshold from 1 to their number",
            )
        return cls(read_bundle(update), trusted, threshold)


def check_signature(release: Path, name: str, update: SignedUpdate) -> Check:
    """Check that the update is sufficiently signed, and that the release has its name and files.

    Existing reports must be the signed ones. Counts are files. Raises InputError if the update is malformed, Unsupported if
    it is for a newer updater.
    """
    try:
        bundle = Bundle.parse(update.data, update.trusted, update.threshold)
    except CheckFailed as error:
        return Check.failed(error.message, of=1)
    signed = _signed_files(release, bundle.manifest)
    problems = (
        [] if bundle.manifest.name == name else [f"the update is for {bundle.manifest.name}, this release is {name}"]
    )
    problems += _differences(release, signed)
    count, signers = len(signed), ", ".join(keyid[:16] for keyid in bundle.signers)
    detail = f"{count} files match update {bundle.digest[:16]}, signed by {signers}"
    return Check.judge(problems, looked_at=count, of=count, detail=detail)


def _signed_files(release: Path, manifest: Manifest) -> Mapping[str, str]:
    """The SHA-256 of every file of the version, and of the existing reports, which devices don't get."""
    evidence = {name: sha256 for name, sha256 in manifest.evidence.items() if (release / name).exists()}
    return {file.path: file.sha256 for file in manifest.files} | evidence


def _differences(release: Path, signed: Mapping[str, str]) -> Iterator[str]:
    for name, sha256 in signed.items():
        path = release / name
        if not path.is_file():
            yield f"{name} is missing"
        elif sha256_file(path) != sha256:
            yield f"{name} differs from the signed file"
