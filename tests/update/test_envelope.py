"""Signatures: who signed, with which keys, over which bytes."""

import base64
import gzip
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1export.errors import CheckFailed, InputError, Unsupported
from r1export.update import ed25519
from r1export.update.envelope import (
    PAYLOAD_TYPE,
    PublicKey,
    SecretKey,
    keygen,
    pre_authentication_encoding,
    sign,
    verifier,
    verify,
)

ALICE, BOB, CAROL = (SecretKey(bytes([n]) * 32) for n in (1, 2, 3))
BODY = b'{"any": "bytes"}'

# RFC 8032, section 7.1: seed, public key, message, signature.
RFC_8032 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
]

# C2SP/wycheproof, testvectors_v1/ed25519_test.json, commit d17cc89f, Apache-2.0, unmodified.
WYCHEPROOF = json.loads(gzip.decompress(Path(__file__).with_name("wycheproof_ed25519.json.gz").read_bytes()))
# Cases 10 to 29 and more: every pair of these halves as R and S over the message 3f is invalid.
EDGES = [
    bytes(32),
    b"\x01" + bytes(31),
    (ed25519.L - 1).to_bytes(32, "little"),
    ed25519.L.to_bytes(32, "little"),
    ed25519.P.to_bytes(32, "little"),
    (2**255 - 20).to_bytes(32, "little"),  # y = -1: the point of order two
    bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"),  # a point of order eight
    b"\xff" * 32,
]


@pytest.fixture(params=["cryptography", "nacl", "python"])
def check(request):
    try:
        backend = verifier(request.param)
    except Unsupported as error:
        pytest.skip(str(error))
    return lambda public, message, signature: (
        ed25519.is_strict(public, signature) and backend(public, message, signature)
    )


def test_published_signatures_verify_in_every_backend(check):
    for _, public, message, signature in RFC_8032:
        assert check(bytes.fromhex(public), bytes.fromhex(message), bytes.fromhex(signature))


def test_every_wycheproof_vector_has_the_same_verdict_in_every_backend(check):
    """Keys of small order, which some libraries take, are refused; keys with a small part beside a large one are not."""
    tests = 0
    for group in WYCHEPROOF["testGroups"]:
        for case in group["tests"]:
            wanted = case["result"] == "valid" or (
                case["result"] == "acceptable" and "MixedOrderPublicKey" in case["flags"]
            )
            message, signature = bytes.fromhex(case["msg"]), bytes.fromhex(case["sig"])
            assert check(bytes.fromhex(group["publicKey"]["pk"]), message, signature) == wanted, case
            tests += 1
    assert tests == WYCHEPROOF["numberOfTests"] == 210


def test_the_signatures_that_came_with_the_algorithm_verify_and_changed_ones_do_not(check):
    """sign.input of ed25519.cr.yp.to (public domain): 128 keys, messages of 0 to 127 bytes."""
    text = gzip.decompress(Path(__file__).with_name("ed25519_sign_input.txt.gz").read_bytes()).decode()
    for number, line in enumerate(text.splitlines()):
        _, public, message, signed = (bytes.fromhex(part) for part in line.split(":")[:4])
        signature = signed[:64]
        assert check(public, message, signature)
        flipped = bytearray(signature)
        flipped[number % 64] ^= 1 << number % 8
        assert not check(public, message, bytes(flipped))
        assert not check(public, message + b"\0", signature)


def test_edge_values_as_signature_or_key_are_refused_in_every_backend(check):
    public = bytes.fromhex(WYCHEPROOF["testGroups"][0]["publicKey"]["pk"])
    assert not any(check(public, b"\x3f", r + s) for r in EDGES for s in EDGES)
    assert not any(check(key, b"\x3f", r + s) for key in EDGES for r in EDGES for s in EDGES[:4])


def test_a_signature_with_its_order_added_is_refused_in_every_backend(check):
    signature = ALICE.sign(BODY)
    scalar = int.from_bytes(signature[32:], "little") + ed25519.L
    assert check(ALICE.public.raw, BODY, signature)
    assert not check(ALICE.public.raw, BODY, signature[:32] + scalar.to_bytes(32, "little"))


def test_short_long_and_empty_signatures_are_refused_in_every_backend(check):
    signature = ALICE.sign(BODY)
    for wrong in (b"", signature[:63], signature + b"\0", signature[:32], signature * 2):
        assert not check(ALICE.public.raw, BODY, wrong)


def test_every_flipped_bit_of_a_signature_is_refused_by_plain_python():
    public, signature = ALICE.public.raw, ALICE.sign(BODY)
    for bit in range(0, 512, 7):
        flipped = bytearray(signature)
        flipped[bit // 8] ^= 1 << bit % 8
        assert not ed25519.verify(public, BODY, bytes(flipped))


@given(st.binary(max_size=200), st.binary(min_size=32, max_size=32))
@settings(max_examples=15, deadline=None)
def test_plain_python_accepts_what_a_library_signed(message, seed):
    key = SecretKey(seed)
    assert ed25519.verify(key.public.raw, message, key.sign(message))
    assert not ed25519.verify(key.public.raw, message + b"x", key.sign(message))


def test_the_signed_bytes_are_those_of_dsse():
    assert (
        pre_authentication_encoding("http://example.com/HelloWorld", b"hello world")
        == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_a_trusted_signature_is_accepted_and_named():
    assert verify(sign(BODY, [ALICE]), BODY, [BOB.public, ALICE.public]) == (ALICE.public.keyid,)


def test_another_manifest_another_key_or_a_revoked_key_is_refused():
    envelope = sign(BODY, [ALICE])
    for body, trusted in ((BODY + b" ", [ALICE.public]), (BODY, [BOB.public]), (BODY, [])):
        with pytest.raises(CheckFailed):
            verify(envelope, body, trusted)


def test_two_of_three_keys_need_two_different_signatures():
    trusted = [ALICE.public, BOB.public, CAROL.public]
    assert len(verify(sign(BODY, [ALICE, CAROL]), BODY, trusted, 2)) == 2
    with pytest.raises(CheckFailed, match="1 trusted keys, expected 2"):
        verify(sign(BODY, [ALICE]), BODY, trusted, 2)


def test_one_key_counts_once_however_often_it_is_listed():
    document = json.loads(sign(BODY, [ALICE]))
    document["signatures"] *= 2
    with pytest.raises(CheckFailed, match="signed by 1"):
        verify(json.dumps(document).encode(), BODY, [ALICE.public, ALICE.public, BOB.public], 2)


def test_a_signature_under_another_keys_id_does_not_count():
    document = json.loads(sign(BODY, [ALICE]))
    document["signatures"].append({"keyid": BOB.public.keyid, "sig": document["signatures"][0]["sig"]})
    with pytest.raises(CheckFailed, match="signed by 1"):
        verify(json.dumps(document).encode(), BODY, [ALICE.public, BOB.public], 2)


def test_a_signature_for_another_type_of_document_is_refused():
    message = pre_authentication_encoding("application/vnd.in-toto+json", BODY)
    signature = {"keyid": ALICE.public.keyid, "sig": base64.b64encode(ALICE.sign(message)).decode()}
    for payload_type in ("application/vnd.in-toto+json", PAYLOAD_TYPE):
        with pytest.raises(CheckFailed):
            verify(json.dumps({"payloadType": payload_type, "signatures": [signature]}).encode(), BODY, [ALICE.public])


def test_a_right_signature_that_claims_another_type_is_refused():
    envelope = sign(BODY, [ALICE]).replace(PAYLOAD_TYPE.encode(), b"application/vnd.in-toto+json")
    with pytest.raises(CheckFailed, match="signed as"):
        verify(envelope, BODY, [ALICE.public])


def test_a_key_that_anybody_can_sign_for_signs_nothing():
    """The identity as key: with R the identity and S = 0 the bare equation holds for every message."""
    key = PublicKey(b"\x01" + bytes(31))
    forged = sign(BODY, [ALICE]).replace(ALICE.public.keyid.encode(), key.keyid.encode())
    signature = base64.b64encode(b"\x01" + bytes(63))
    fields = json.loads(forged)
    fields["signatures"][0]["sig"] = signature.decode()
    with pytest.raises(CheckFailed, match="signed by 0"):
        verify(json.dumps(fields).encode(), BODY, [key])


def test_each_key_signs_once_and_somebody_has_to():
    for keys in ([], [ALICE, ALICE]):
        with pytest.raises(InputError, match="once"):
            sign(BODY, keys)


@pytest.mark.parametrize(
    "envelope",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"payloadType": "a"}',
        b'{"payloadType": "a", "signatures": {}}',
        b'{"payloadType": "a", "payloadType": "b", "signatures": []}',
        b'{"payloadType": "a", "signatures": [], "extra": 1}',
        b'{"payloadType": "a", "signatures": [{"keyid": "zz", "sig": ""}]}',
        b'{"payloadType": "a", "signatures": [' + b"1," * 100 + b"1]}",
        b"[" * 60000,
        b" " * 70000,
    ],
)
def test_malformed_envelopes_are_refused(envelope):
    with pytest.raises(InputError):
        verify(envelope, BODY, [ALICE.public])


def test_members_that_may_be_ignored_change_nothing_and_others_are_refused():
    def extended(name):
        document = json.loads(sign(BODY, [ALICE]))
        document[name] = document["signatures"][0][name] = {"any": 1}
        return json.dumps(document).encode()

    assert verify(extended("x-courier"), BODY, [ALICE.public]) == (ALICE.public.keyid,)
    with pytest.raises(InputError, match="unknown key"):
        verify(extended("courier"), BODY, [ALICE.public])


def test_a_threshold_of_zero_is_refused():
    with pytest.raises(InputError):
        verify(sign(BODY, [ALICE]), BODY, [ALICE.public], 0)


def test_keygen_writes_a_secret_only_for_its_owner_and_never_replaces_one(tmp_path):
    public = keygen(tmp_path / "fleet")
    assert stat.S_IMODE(os.stat(tmp_path / "fleet.key").st_mode) == 0o600
    assert PublicKey.read(tmp_path / "fleet.pub") == public == SecretKey.read(tmp_path / "fleet.key").public
    before = (tmp_path / "fleet.key").read_bytes()
    with pytest.raises(InputError, match="exists"):
        keygen(tmp_path / "fleet")
    assert (tmp_path / "fleet.key").read_bytes() == before


def test_key_files_are_those_of_other_tools(tmp_path):
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

    keygen(tmp_path / "fleet")
    secret = load_pem_private_key((tmp_path / "fleet.key").read_bytes(), None)
    assert secret.private_bytes_raw() == SecretKey.read(tmp_path / "fleet.key").seed
    assert (
        load_pem_public_key((tmp_path / "fleet.pub").read_bytes()).public_bytes_raw()
        == PublicKey.read(tmp_path / "fleet.pub").raw
    )


def test_a_secret_key_is_no_public_key_and_the_other_way_round(tmp_path):
    keygen(tmp_path / "fleet")
    with pytest.raises(InputError, match="public key"):
        PublicKey.read(tmp_path / "fleet.key")
    with pytest.raises(InputError, match="private key"):
        SecretKey.read(tmp_path / "fleet.pub")
    with pytest.raises(InputError, match="no such file"):
        PublicKey.read(tmp_path / "nobody.pub")


def test_a_file_that_is_no_key_is_refused_at_once(tmp_path):
    begin, end = "-----BEGIN PUBLIC KEY-----", "-----END PUBLIC KEY-----"
    for text in (
        "",
        begin,
        begin + " " * 9000,
        begin + "\n" * 9000 + end,
        begin + "A" * 44 + end,
        "x" * 20_000,
        "\udcff",
    ):
        (tmp_path / "no.pub").write_bytes(text.encode(errors="surrogateescape"))
        started = time.monotonic()
        with pytest.raises(InputError):
            PublicKey.read(tmp_path / "no.pub")
        assert time.monotonic() - started < 1
    os.mkfifo(tmp_path / "pipe.pub")
    for name in ("pipe.pub", "."):
        with pytest.raises(InputError, match="not a regular file"):
            PublicKey.read(tmp_path / name)


def test_a_secret_key_shows_nothing_of_itself():
    assert "01" * 8 not in repr(ALICE)
    assert str(ALICE.seed) not in repr(ALICE)
    assert repr(ALICE) == "SecretKey()"


def test_signing_without_a_library_says_what_to_install():
    code = (
        "import sys; sys.modules['cryptography'] = sys.modules['nacl'] = None\n"
        "from r1export.update.envelope import SecretKey, verifier\nfrom r1export.update import ed25519\n"
        "assert verifier() is ed25519.verify\nSecretKey(bytes(32)).public"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install cryptography" in process.stderr
