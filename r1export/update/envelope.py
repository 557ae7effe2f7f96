"""Signatures of updates: Ed25519 signatures of N of M keys over the manifest's exact bytes.

The signed bytes are the pre-authentication encoding of DSSE (https://github.com/secure-systems-lab/dsse/blob/master/protocol.md):

    "DSSEv1" SP len(type) SP type SP len(body) SP body

so no canonical JSON is needed, and a signature of another type of document is invalid here.
Backends: cryptography, else PyNaCl, else `ed25519` of this package. They agree on all inputs, since `is_strict` comes first.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterable, Sequence

from r1export.errors import CheckFailed, InputError, Unsupported
from r1export.update import ed25519
from r1export.update.atomic_io import read_regular
from r1export.update.strict_json import parse_json

PAYLOAD_TYPE = "application/vnd.r1export.manifest+json"
MAX_ENVELOPE = 64 << 10  # bytes
MAX_SIGNATURES = 64
MAX_PEM = 10_000  # bytes
_SECRET_PREFIX = bytes.fromhex(
    "302e020100300506032b657004220420"
)  # PKCS #8 of RFC 8410: the 32 bytes of the seed follow
_PUBLIC_PREFIX = bytes.fromhex("302a300506032b6570032100")  # SubjectPublicKeyInfo of RFC 8410: 32 bytes follow
_KEYID = re.compile(r"[0-9a-f]{64}")
_SIGNATURE = re.compile(r"[A-Za-z0-9+/]{86}==")
_TYPE = re.compile(r"[\x21-\x7e]{1,100}")
Verify = Callable[[bytes, bytes, bytes], bool]  # (public, message, signature)


@dataclass(frozen=True)
class PublicKey:
    """An Ed25519 public key, 32 bytes."""

    raw: bytes

    @property
    def keyid(self) -> str:
        """SHA-256 of the 32 bytes: a hint which key to try, not proof of anything."""
        return hashlib.sha256(self.raw).hexdigest()

    @classmethod
    def read(cls, path: Path) -> PublicKey:
        """Read PREFIX.pub. Raises InputError if it is not an Ed25519 public key in PEM."""
        return cls(_from_pem(path, "PUBLIC KEY", _PUBLIC_PREFIX))

    def to_pem(self) -> str:
        """What `openssl pkey -pubin` reads."""
        return _to_pem("PUBLIC KEY", _PUBLIC_PREFIX + self.raw)


@dataclass(frozen=True)
class SecretKey:
    """An Ed25519 secret key: the 32 bytes of its seed, which are never printed."""

    seed: bytes = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> SecretKey:
        """Read PREFIX.key. Raises InputError if it is not an Ed25519 secret key in PEM."""
        return cls(_from_pem(path, "PRIVATE KEY", _SECRET_PREFIX))

    def to_pem(self) -> str:
        """What `openssl pkey` reads."""
        return _to_pem("PRIVATE KEY", _SECRET_PREFIX + self.seed)

    @property
    def public(self) -> PublicKey:
        """The public key for devices. Raises Unsupported without cryptography and PyNaCl."""
        return PublicKey(_signer()(self.seed, b"")[0])

    def sign(self, message: bytes) -> bytes:
        """The signature, 64 bytes. Raises Unsupported without cryptography and PyNaCl."""
        return _signer()(self.seed, message)[1]


def keygen(prefix: Path) -> PublicKey:
    """Write a new key pair, PREFIX.key (mode 0600) and PREFIX.pub.

    Raises:
        InputError: one of the files exists.
        Unsupported: neither cryptography nor PyNaCl is installed.
    """
    secret = SecretKey(os.urandom(32))
    files = {
        prefix.with_name(prefix.name + ".key"): (secret.to_pem(), 0o600),
        prefix.with_name(prefix.name + ".pub"): (secret.public.to_pem(), 0o644),
    }
    for path in files:
        if path.exists():
            raise InputError(f"{path} exists", "choose another prefix; a key in use must not be overwritten")
    for path, (text, mode) in files.items():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
            file.write(text)
    return secret.public


def pre_authentication_encoding(payload_type: str, body: bytes) -> bytes:
    """The bytes that are signed."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(body), body)


def sign(manifest: bytes, keys: Iterable[SecretKey]) -> bytes:
    """The envelope's JSON: one signature of each key over the bytes of the manifest."""
    message = pre_authentication_encoding(PAYLOAD_TYPE, manifest)
    signatures = [{"keyid": key.public.keyid, "sig": base64.b64encode(key.sign(message)).decode()} for key in keys]
    if not signatures or len({entry["keyid"] for entry in signatures}) != len(signatures):
        raise InputError(f"no signing key, or a duplicate among {len(signatures)}", "pass each secret key once")
    return json.dumps({"payloadType": PAYLOAD_TYPE, "signatures": signatures}, separators=(",", ":")).encode()


def verify(envelope: bytes, manifest: bytes, trusted: Sequence[PublicKey], threshold: int = 1) -> tuple[str, ...]:
    """Ids of the trusted keys that signed `manifest`: at least `threshold` different ones.

    Raises:
        InputError: the envelope is malformed.
        CheckFailed: it is for another type of document, or too few trusted keys signed these bytes.
    """
    payload_type, signatures = _parse(envelope)
    if payload_type != PAYLOAD_TYPE:
        raise CheckFailed(
            f"signed as {payload_type!r}, expected {PAYLOAD_TYPE!r}", "use an update from `r1export bundle`"
        )
    if threshold < 1:
        raise InputError(f"{threshold} signatures required", "require at least one")
    message = pre_authentication_encoding(PAYLOAD_TYPE, manifest)
    check = verifier()
    signers = []
    for key in dict.fromkeys(trusted):  # each key counts once, whatever ids the envelope claims
        if any(
            keyid == key.keyid and ed25519.is_strict(key.raw, sig) and check(key.raw, message, sig)
            for keyid, sig in signatures
        ):
            signers.append(key.keyid)
    if len(signers) < threshold:
        raise CheckFailed(
            f"signed by {len(signers)} trusted keys, expected {threshold}",
            "sign it with keys that this device trusts",
        )
    return tuple(signers)


def describe(envelope: bytes) -> list[str]:
    """The key ids that the envelope claims, verified or not. Raises InputError if it is malformed."""
    return [keyid for keyid, _ in _parse(envelope)[1]]


def _parse(envelope: bytes) -> tuple[str, list[tuple[str, bytes]]]:
    fields = parse_json(envelope, "envelope", MAX_ENVELOPE)
    payload_type = fields.text("payloadType", _TYPE)
    signatures = []
    for entry in fields.records("signatures", MAX_SIGNATURES):
        signatures.append((entry.text("keyid", _KEYID), base64.b64decode(entry.text("sig", _SIGNATURE))))
        entry.done()
    fields.done()
    return payload_type, signatures


def verifier(backend: str = "") -> Verify:
    """The verification function of `backend` (cryptography, nacl, python), or of the first one that is installed."""
    makers: dict[str, Callable[[], Verify]] = {
        "cryptography": _cryptography,
        "nacl": _nacl,
        "python": lambda: ed25519.verify,
    }
    for name in [backend] if backend else makers:
        try:
            return makers[name]()
        except ImportError:
            continue
    raise Unsupported(f"{backend} is not installed", "install it, or use the default backend")


def _cryptography() -> Verify:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    def check(public: bytes, message: bytes, signature: bytes) -> bool:
        try:
            Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
        except (InvalidSignature, ValueError):
            return False
        return True

    return check


def _nacl() -> Verify:
    from nacl.exceptions import CryptoError
    from nacl.signing import VerifyKey

    def check(public: bytes, message: bytes, signature: bytes) -> bool:
        try:
            VerifyKey(public).verify(message, signature)
        except (CryptoError, ValueError):
            return False
        return True

    return check


def _signer() -> Callable[[bytes, bytes], tuple[bytes, bytes]]:
    """(seed, message) -> (public key, signature)."""
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        def with_cryptography(seed: bytes, message: bytes) -> tuple[bytes, bytes]:
            key = Ed25519PrivateKey.from_private_bytes(seed)
            return key.public_key().public_bytes_raw(), key.sign(message)

        return with_cryptography
    except ImportError:
        pass
    try:
        from nacl.signing import SigningKey
    except ImportError:
        raise Unsupported("signing needs cryptography or PyNaCl", "pip install cryptography") from None

    def with_nacl(seed: bytes, message: bytes) -> tuple[bytes, bytes]:
        key = SigningKey(seed)
        return bytes(key.verify_key), key.sign(message).signature

    return with_nacl


def _to_pem(kind: str, data: bytes) -> str:
    return f"-----BEGIN {kind}-----\n{base64.b64encode(data).decode()}\n-----END {kind}-----\n"


def _from_pem(path: Path, kind: str, prefix: bytes) -> bytes:
    try:
        text = read_regular(path, MAX_PEM).decode()
        match = re.search(rf"-----BEGIN {kind}-----([A-Za-z0-9+/=\s]*)-----END {kind}-----", text)
        data = base64.b64decode("".join(match[1].split()), validate=True) if match else b""
    except FileNotFoundError:
        raise InputError(f"{path}: no such file", "create a key pair with `r1export keygen PREFIX`") from None
    except (UnicodeDecodeError, binascii.Error):
        data = b""
    if len(data) != len(prefix) + 32 or not data.startswith(prefix):
        raise InputError(
            f"{path} is not an Ed25519 {kind.lower()} in PEM", "create a key pair with `r1export keygen PREFIX`"
        )
    return data[len(prefix) :]
