"""Rules over values: the first that does not hold refuses."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1export.device.policy import CLOCK_SLACK, MAX_TRIES, RESERVE, Installed, check_offer, counts_as_try
from r1export.errors import CheckFailed, Inconclusive, Unsupported
from r1export.update.manifest import Base, Health, Manifest, Update

BASE = Base("tiny", "a" * 64, "b" * 64)
NOW = 1_800_000_000
OFFER = Manifest(
    name="05-x",
    product="camera",
    device_class="v1",
    seq=5,
    min_seq=2,
    created=NOW,
    expires=NOW + 100,
    base=BASE,
    payload_bytes=0,
    payload_sha256="0" * 64,
    updates=(Update("digits", "d" * 64),),
    tensors={},
    files=(),
    health=Health(1e-4, 0.99, 1.0),
    evidence={},
)
DEVICE = Installed("camera", "v1", BASE, seq=4, digest="four", min_seq=1, clock=NOW - 50, held=frozenset(["d" * 64]))


def check(offer=OFFER, device=DEVICE, *, digest="five", now=NOW, free=RESERVE + 10, needed=10, **changes):
    fields = {field.name for field in dataclasses.fields(Manifest)}
    offer = dataclasses.replace(offer, **{name: value for name, value in changes.items() if name in fields})
    check_offer(offer, digest, device, now=now, free=free, needed=needed)


def test_an_update_that_fits_is_accepted():
    check()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"product": "toaster"}, CheckFailed, "product toaster, this device has camera"),
        ({"device_class": "v2"}, CheckFailed, "device class"),
        ({"base": Base("tiny", "c" * 64, "b" * 64)}, CheckFailed, "base model"),
        ({"base": Base("tiny", "a" * 64, "c" * 64)}, CheckFailed, "base release"),
        ({"seq": 4}, CheckFailed, "update 4 is not newer than 4"),
        ({"seq": 3}, CheckFailed, "not newer"),
        ({"now": NOW + 100}, CheckFailed, "expired"),
        ({"now": NOW - CLOCK_SLACK - 1}, Inconclusive, "set the clock"),
        ({"now": 0}, Inconclusive, "clock"),
        ({"created": NOW + 200}, CheckFailed, "expired"),
        ({"device": dataclasses.replace(DEVICE, clock=NOW + 100)}, CheckFailed, "expired"),
        ({"device": dataclasses.replace(DEVICE, held=frozenset())}, CheckFailed, "factors of digits"),
        ({"device": dataclasses.replace(DEVICE, tries={"five": MAX_TRIES})}, CheckFailed, "given up"),
        ({"device": dataclasses.replace(DEVICE, seq=0, min_seq=6)}, CheckFailed, "lowest that is allowed"),
        ({"free": RESERVE + 9}, Unsupported, "bytes are free"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(options, error, match):
    with pytest.raises(error, match=match):
        check(**options)


def test_the_newest_update_is_taken_again_but_no_other_with_its_number():
    check(seq=4, digest="four")
    with pytest.raises(CheckFailed):
        check(seq=4, digest="another")


def test_an_update_without_expiry_needs_no_clock():
    check(expires=0, now=0)


@given(st.integers(1, 100), st.integers(0, 100))
def test_nothing_older_than_the_newest_is_ever_taken(seq, highest):
    device = dataclasses.replace(DEVICE, seq=highest, digest="highest", min_seq=0)
    if seq > highest:
        check(seq=seq, min_seq=0, device=device)
    else:
        with pytest.raises(CheckFailed, match="not newer"):
            check(seq=seq, min_seq=0, device=device)


def test_only_failures_that_speak_against_the_update_are_counted():
    assert counts_as_try(CheckFailed("unhealthy"))
    assert not counts_as_try(Unsupported("disk full"))
    assert not counts_as_try(OSError())
    assert not counts_as_try(KeyboardInterrupt())
