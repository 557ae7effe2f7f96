"""Is a release the one that a signed update says? So it need not be believed what it says of itself."""

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
    """The bytes of a .r1u file, and how many of which keys have to have signed it."""

    data: bytes
    trusted: tuple[PublicKey, ...]
    threshold: int = 1

    @classmethod
    def read(cls, update: Path, trust: Sequence[Path], threshold: int = 1) -> SignedUpdate:
        """Raises InputError if a file cannot be read, or more signatures are asked for than there are keys."""
        trusted = tuple(dict.fromkeys(PublicKey.read(path) for path in trust))
        if not 1 <= threshold <= len(trusted):
            raise InputError(
                f"{threshold} signatures of {len(trusted)} keys",
                "give the fleet's public keys with --trust, and a --threshold from 1 to their number",
            )
        return cls(read_bundle(update), trusted, threshold)


def check_signature(release: Path, name: str, update: SignedUpdate) -> Check:
    """The release is called `name` and has the files that the update says, and the update is signed as it has to be.

    Reports that are there have to be those that were signed. Counts are files. Raises InputError if the update is none,
    Unsupported if it is for a newer updater.
    """
    try:
        bundle = Bundle.parse(update.data, update.trusted, update.threshold)
    except CheckFailed as error:
        return Check.failed(error.message, of=1)
    signed = _signed_files(release, bundle.manifest)
    problems = [] if bundle.manifest.name == name else [f"the update is of {bundle.manifest.name}, this is {name}"]
    problems += _differences(release, signed)
    count, signers = len(signed), ", ".join(keyid[:16] for keyid in bundle.signers)
    detail = f"{count} files are those of update {bundle.digest[:16]}, signed by {signers}"
    return Check.judge(problems, looked_at=count, of=count, detail=detail)


def _signed_files(release: Path, manifest: Manifest) -> Mapping[str, str]:
    """The SHA-256 of every file of the version, and of those reports that are there: devices get none."""
    evidence = {name: sha256 for name, sha256 in manifest.evidence.items() if (release / name).exists()}
    return {file.path: file.sha256 for file in manifest.files} | evidence


def _differences(release: Path, signed: Mapping[str, str]) -> Iterator[str]:
    for name, sha256 in signed.items():
        path = release / name
        if not path.is_file():
            yield f"{name} is missing"
        elif sha256_file(path) != sha256:
            yield f"{name} is not the file that was signed"
