"""Ed25519 verification in 90 lines of plain Python, for devices that have neither cryptography nor PyNaCl.

It can only verify, so timing can't leak a secret. About 5 ms per signature.
Source: RFC 8032, sections 5.1.3 (decoding) and 5.1.7 (verification); extended coordinates (X, Y, Z, T) with
x = X/Z, y = Y/Z, x y = T/Z, and the addition of section 5.1.4.
"""

from __future__ import annotations

import hashlib
from typing import Tuple

P = 2**255 - 19  # the field
L = 2**252 + 27742317777372353535851937790883648493  # order of the base point
D = -121665 * pow(121666, -1, P) % P
SQRT_MINUS_1 = pow(2, (P - 1) // 4, P)

Point = Tuple[int, int, int, int]
IDENTITY: Point = (0, 1, 1, 0)


def is_strict(public: bytes, signature: bytes) -> bool:
    """Whether key and signature are encoded in the one canonical way and the key is not of small order.

    Libraries disagree about such inputs; rejecting them first makes all backends agree.
    """
    if len(public) != 32 or len(signature) != 64 or int.from_bytes(signature[32:], "little") >= L:
        return False
    point = _decode(public)
    return point is not None and _decode(signature[:32]) is not None and not _same(_times(8, point), IDENTITY)


def verify(public: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` (64 bytes) over `message` was made with the secret of `public` (32 bytes)."""
    if not is_strict(public, signature):
        return False
    point = _decode(public)
    assert point is not None
    scalar = int.from_bytes(signature[32:], "little")
    challenge = int.from_bytes(hashlib.sha512(signature[:32] + public + message).digest(), "little") % L
    x, y, z, t = _times(challenge, point)
    return _encode(_add(_times(scalar, BASE), (P - x, y, z, P - t))) == signature[:32]  # R = S B - k A


def _add(one: Point, other: Point) -> Point:
    x1, y1, z1, t1 = one
    x2, y2, z2, t2 = other
    a, b = (y1 - x1) * (y2 - x2) % P, (y1 + x1) * (y2 + x2) % P
    c, d = 2 * t1 * t2 * D % P, 2 * z1 * z2 % P
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % P, g * h % P, f * g % P, e * h % P


def _times(scalar: int, point: Point) -> Point:
    result = IDENTITY
    while scalar:
        if scalar & 1:
            result = _add(result, point)
        point = _add(point, point)
        scalar >>= 1
    return result


def _same(one: Point, other: Point) -> bool:
    return (one[0] * other[2] - other[0] * one[2]) % P == 0 and (one[1] * other[2] - other[1] * one[2]) % P == 0


def _decode(encoded: bytes) -> Point | None:
    """The point of 32 bytes, or None if they are not the canonical encoding of any."""
    number = int.from_bytes(encoded, "little")
    sign, y = number >> 255, number & (2**255 - 1)
    if y >= P:
        return None
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    if (x * x - square) % P:
        x = x * SQRT_MINUS_1 % P
    if (x * x - square) % P or (x == 0 and sign):
        return None
    if x & 1 != sign:
        x = P - x
    return x, y, 1, x * y % P


def _encode(point: Point) -> bytes:
    inverse = pow(point[2], -1, P)
    x, y = point[0] * inverse % P, point[1] * inverse % P
    return (y | (x & 1) << 255).to_bytes(32, "little")


_base = _decode((4 * pow(5, -1, P) % P).to_bytes(32, "little"))
assert _base is not None
BASE: Point = _base
