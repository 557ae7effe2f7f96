"""model.sig: the signature of a folder that the `model-signing` library verifies (OpenSSF Model Signing 1.0).

A sigstore bundle v0.3 around a DSSE envelope around an in-toto Statement v1, whose predicate lists the SHA-256 of every file.
It is signed with P-256, since that library refuses Ed25519; updates keep their Ed25519 keys.
Sources: github.com/sigstore/model-transparency 1.1 (_signing/signing.py, sign_ec_key.py), DSSE protocol 1.0.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from r1export.errors import InputError, first_line
from r1export.update.atomic_io import json_bytes, read_regular, sha256_bytes, sha256_file, write_file

SIGNATURE = "model.sig"
BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"
MAX_KEY = 1 << 16  # bytes
IGNORED = (".git", ".gitattributes", ".github", ".gitignore")  # by the library, wherever it verifies
KEY_HINT = "create one: openssl ecparam -name prime256v1 -genkey -noout -out model.key"


def read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A P-256 secret key in PEM, without a password. Raises InputError for anything else."""
    try:
        key = serialization.load_pem_private_key(read_regular(path, MAX_KEY), None)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not a P-256 key in PEM: {first_line(error)}", KEY_HINT) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InputError(f"{path}: not a P-256 key", KEY_HINT)
    return key


def write_signature(folder: Path, key: ec.EllipticCurvePrivateKey, out: Path) -> int:
    """Sign every file of `folder` and write the bundle to `out`; returns how many files.

    Raises InputError: the folder has no files, or a link, which would be signed for what it names now.
    """
    digests = _digests(folder, out)
    payload = json.dumps(_statement(folder.resolve().name, digests, _inside(folder, out))).encode()
    signature = key.sign(_encoded(payload), ec.ECDSA(hashes.SHA256()))
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    bundle = {
        "mediaType": BUNDLE_TYPE,
        "verificationMaterial": {"publicKey": {"hint": sha256_bytes(public)}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }
    write_file(out, json_bytes(bundle))
    return len(digests)


def _digests(folder: Path, out: Path) -> dict[str, str]:
    """Path in the folder -> SHA-256, in the order that the library uses."""
    own = _inside(folder, out)
    found = {}
    for path in sorted(path.relative_to(folder) for path in folder.rglob("*")):
        if (folder / path).is_symlink():
            raise InputError(f"{folder / path} is a link", "replace the link with the file")
        if (folder / path).is_file() and path.parts[0] not in IGNORED and path.as_posix() not in own:
            found[path.as_posix()] = sha256_file(folder / path)
    if not found:
        raise InputError(f"{folder} has no files to sign", "use a release folder")
    return found


def _inside(folder: Path, out: Path) -> list[str]:
    """The signature's own path in the folder, if it lies there."""
    whole, place = folder.resolve(), out.resolve()
    return [place.relative_to(whole).as_posix()] if whole in place.parents else []


def _statement(name: str, digests: dict[str, str], own: list[str]) -> dict[str, object]:
    root = sha256_bytes(b"".join(bytes.fromhex(digest) for digest in digests.values()))
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {"sha256": root}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [*own, *IGNORED],
            },
            "resources": [{"name": path, "algorithm": "sha256", "digest": digest} for path, digest in digests.items()],
        },
    }


def _encoded(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: what is signed."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)
