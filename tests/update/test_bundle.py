"""The flat file: what is in it comes out again, and whatever else it could hold is refused."""

import hashlib
import os
import random

import pytest

from r1export.errors import CheckFailed, InputError, R1ExportError
from r1export.update.bundle import (
    HEAD_ALIGN,
    MAGIC,
    MAX_BUNDLE,
    Bundle,
    assemble,
    inspect,
    read_bundle,
    split,
)
from r1export.update.envelope import SecretKey, sign
from r1export.update.factors import ExpertUpdate
from r1export.update.lab.publish import Step, Terms, make_bundle
from r1export.update.manifest import Base, File, Health, Manifest, Part

ZERO = "0" * 64


@pytest.fixture(scope="session")
def bundle(run, key) -> Bundle:
    return make_bundle(run, Step(2, since=1), [key], Terms(created=1_800_000_000))


@pytest.fixture(scope="session")
def small(key) -> bytes:
    """A bundle of less than 4 kB."""
    payload = bytes(range(256)) * 8
    text = Manifest(
        name="small",
        product="p",
        device_class="c",
        seq=1,
        min_seq=0,
        created=1,
        expires=0,
        base=Base("b", ZERO, ZERO),
        payload_bytes=len(payload),
        payload_sha256=hashlib.sha256(payload).hexdigest(),
        updates=(),
        tensors={},
        files=(File("manifest.json", len(payload), ZERO, (Part("payload", 0, len(payload)),)),),
        health=Health(0.1, 0.9, 1),
        evidence={},
    ).to_bytes()
    return assemble(sign(text, [key]), text, payload)


def test_what_was_written_is_read(bundle, key):
    data = bundle.to_bytes()
    again = Bundle.parse(data, [key.public])
    assert again == bundle
    assert again.to_bytes() == data
    assert data.startswith(MAGIC)
    assert (len(data) - len(bundle.payload)) % HEAD_ALIGN == 0


def test_the_factors_are_those_of_the_task(bundle, run):
    (path,) = (run / "tasks").glob("02-*/factors.safetensors")
    (digest,) = bundle.carried
    assert bundle.carried[digest].to_bytes() == path.read_bytes()
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_truncation_is_refused(small, key):
    assert len(small) < 4096
    for length in range(len(small)):
        with pytest.raises(R1ExportError):
            Bundle.parse(small[:length], [key.public])


def test_every_flipped_byte_is_refused(small, key):
    rng = random.Random(0)
    for position in range(len(small)):
        flipped = bytearray(small)
        flipped[position] ^= 1 << rng.randrange(8)
        with pytest.raises(R1ExportError):
            Bundle.parse(bytes(flipped), [key.public])


def test_bytes_after_the_end_are_refused(small, key):
    for tail in (b"\0", b"\0" * 64, small):
        with pytest.raises(CheckFailed, match="payload has"):
            Bundle.parse(small + tail, [key.public])


def test_lengths_beyond_the_file_or_the_limits_are_refused(small):
    for position in (8, 8 + 4 + int.from_bytes(small[8:12], "little")):
        for length in (0xFFFFFFFF, 1 << 31, 1 << 20, len(small)):
            changed = small[:position] + length.to_bytes(4, "little") + small[position + 4 :]
            with pytest.raises(InputError, match=f"claims {length} bytes"):
                split(changed)
    with pytest.raises(InputError, match="more than"):
        split(MAGIC + bytes(MAX_BUNDLE))
    length = (64 << 10) + 1  # all there, and still more than an envelope may have
    with pytest.raises(InputError, match=f"claims {length} bytes, expected at most {64 << 10}"):
        split(MAGIC + length.to_bytes(4, "little") + bytes(2 * length))


def test_a_fill_between_parts_that_is_not_zero_is_refused(bundle, key):
    import dataclasses

    regions = [
        part
        for file in bundle.manifest.files
        for part in file.parts or ()
        if part.source == "payload" and part.nbytes % 8
    ]
    payload = bytearray(bundle.payload)
    payload[regions[0].offset + regions[0].nbytes] = 1
    text = dataclasses.replace(bundle.manifest, payload_sha256=hashlib.sha256(payload).hexdigest()).to_bytes()
    with pytest.raises(InputError, match="padding"):
        Bundle.parse(assemble(sign(text, [key]), text, bytes(payload)), [key.public])


def test_factors_that_are_not_those_of_the_digest_are_refused(bundle, key):
    import dataclasses

    update = dataclasses.replace(bundle.manifest.updates[1], sha256=ZERO)
    text = dataclasses.replace(bundle.manifest, updates=(bundle.manifest.updates[0], update)).to_bytes()
    changed = Bundle.parse(assemble(sign(text, [key]), text, bundle.payload), [key.public])
    with pytest.raises(CheckFailed, match="the factors of shapes"):
        changed.carried  # noqa: B018


def test_only_regular_files_of_a_sane_size_are_read(tmp_path, small):
    (tmp_path / "small.r1u").write_bytes(small)
    assert read_bundle(tmp_path / "small.r1u") == small
    os.mkfifo(tmp_path / "fifo")
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(MAX_BUNDLE + 1)
    with open(tmp_path / "huge", "wb") as file:
        file.truncate((4 << 30) + 5)
    for name in ("fifo", "sparse", "huge", ".", "nothing", "small.r1u/x"):
        with pytest.raises(InputError):
            read_bundle(tmp_path / name)


def test_inspect_says_what_is_inside_and_who_claims_to_have_signed(bundle, tmp_path, key):
    (tmp_path / "u.r1u").write_bytes(bundle.to_bytes())
    found = inspect(tmp_path / "u.r1u")
    assert [(update["task"], update["carried"]) for update in found["updates"]] == [("digits", False), ("shapes", True)]
    assert found["signed_by"] == [key.public.keyid]
    assert found["factors_bytes"] == sum(update.nbytes for update in bundle.carried.values())
    assert found["slot"] == bundle.slot


def test_a_bundle_costs_little_more_than_its_factors(bundle):
    factors = sum(update.nbytes for update in bundle.carried.values())
    assert isinstance(next(iter(bundle.carried.values())), ExpertUpdate)
    assert len(bundle.to_bytes()) < factors + 9000


def test_another_magic_is_refused_in_words(small):
    with pytest.raises(InputError, match=r"not a \.r1u file"):
        split(b"PK\x03\x04" + small[4:])


def test_nobody_elses_key_opens_it(small):
    with pytest.raises(CheckFailed):
        Bundle.parse(small, [SecretKey(b"\x05" * 32).public])
