"""Rules over values: the first that does not hold refuses."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1export.device.policy import (
    CLOCK_SLACK,
    MAX_SEQ_JUMP,
    MAX_TRIES,
    RESERVE,
    Installed,
    check_offer,
    check_repair,
    counts_as_try,
    is_expired,
)
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
        ({"device": dataclasses.replace(DEVICE, seq=0, min_seq=6)}, CheckFailed, "lowest allowed"),
        ({"free": RESERVE + 9}, Unsupported, "bytes free"),
        ({"seq": 5 + MAX_SEQ_JUMP, "min_seq": 0}, CheckFailed, "more than 1000000 above 4"),
        ({"seq": 2**53 - 1, "min_seq": 2**53 - 1}, CheckFailed, "more than 1000000 above 4"),
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


def test_a_number_may_jump_as_far_as_the_device_allows_from_the_highest_that_it_knows():
    check(seq=4 + MAX_SEQ_JUMP)
    far = dataclasses.replace(DEVICE, seq=0, min_seq=2000, max_seq_jump=10)
    check(seq=2010, device=far)
    with pytest.raises(CheckFailed, match="more than 10 above 2000"):
        check(seq=2011, device=far)


@given(st.lists(st.integers(1, 2**53 - 1), max_size=20), st.integers(1, 2**40))
def test_no_few_updates_can_use_up_the_numbers(numbers, jump):
    """Whatever is signed, each update takes at most `max_seq_jump` numbers from those that are left."""
    highest = 0
    for seq in numbers:
        device = dataclasses.replace(DEVICE, seq=highest, digest="highest", min_seq=0, max_seq_jump=jump)
        try:
            check(seq=seq, min_seq=0, device=device)
        except CheckFailed:
            continue
        assert highest < seq <= highest + jump
        highest = seq


REPAIR = dataclasses.replace(DEVICE, seq=9, digest="nine", tries={"five": MAX_TRIES})


def repair(device=REPAIR, free=RESERVE + 10, **changes):
    check_repair(dataclasses.replace(OFFER, **changes), device, free=free, needed=10)


def test_what_repairs_the_current_version_may_be_old_expired_or_given_up():
    repair()
    repair(expires=1)
    repair(seq=2**53 - 1, min_seq=2**53 - 1)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"product": "toaster"}, CheckFailed),
        ({"base": Base("tiny", "c" * 64, "b" * 64)}, CheckFailed),
        ({"device": dataclasses.replace(REPAIR, min_seq=6)}, CheckFailed),
        ({"device": dataclasses.replace(REPAIR, held=frozenset())}, CheckFailed),
        ({"free": RESERVE + 9}, Unsupported),
    ],
)
def test_a_repair_is_for_this_device_and_what_may_run_on_it(changes, error):
    with pytest.raises(error):
        repair(**changes)


@pytest.mark.parametrize(
    ("expires", "clock", "now", "expired"),
    [
        (0, 0, 2**60, False),
        (NOW + 1, 0, NOW, False),
        (NOW + 1, 0, NOW + 1, True),
        (NOW + 1, NOW + 1, 0, True),
        (NOW, 0, 0, True),
    ],
)
def test_the_latest_time_that_is_known_decides_what_has_expired(expires, clock, now, expired):
    assert is_expired(dataclasses.replace(OFFER, expires=expires), clock, now) == expired
