"""Whether a device takes an update: rules over values alone, no files and no clock of its own.

Each rule is a sentence; the first that does not hold refuses the update and says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from r1export.errors import CheckFailed, Inconclusive, R1ExportError, Unsupported
from r1export.update.manifest import Base, Manifest

MAX_TRIES = 3  # an update that failed its checks, or the device with it, this often is given up
CLOCK_SLACK = 86_400  # seconds that a device's clock may lag behind the lab's before it is not believed
RESERVE = 4 << 20  # bytes that stay free on the device


@dataclass(frozen=True)
class Installed:
    """What a device is and has. `seq` is the highest ever installed, `digest` its manifest's, `clock` the latest signed time seen."""

    product: str
    device_class: str
    base: Base
    seq: int = 0
    digest: str = ""
    min_seq: int = 0
    clock: int = 0
    held: frozenset[str] = frozenset()
    tries: Mapping[str, int] = field(default_factory=dict)


def check_offer(manifest: Manifest, digest: str, installed: Installed, *, now: int, free: int, needed: int) -> None:
    """Accept the update with this manifest (SHA-256 `digest`), or raise.

    `now` is the device's clock in seconds since 1970, `free` and `needed` are bytes.

    Raises:
        CheckFailed: meant for another device, older than what was installed, expired, or given up.
        Inconclusive: the clock cannot tell whether it has expired.
        Unsupported: no space.
    """
    check_target(manifest, installed)
    check_sequence(manifest, digest, installed)
    check_time(manifest, installed, now)
    check_held(manifest, installed)
    if installed.tries.get(digest, 0) >= MAX_TRIES:
        raise CheckFailed(
            f"update {manifest.seq} failed {MAX_TRIES} times and is given up",
            "look at the cause, then apply it with --retry",
        )
    if free < needed + RESERVE:
        raise Unsupported(
            f"{free} bytes are free, {needed + RESERVE} are needed", "free space, or use a store in overlay mode"
        )


def check_target(manifest: Manifest, installed: Installed) -> None:
    """The update is for this product, this class of device and the base that the device has."""
    for name, found, expected in (
        ("product", manifest.product, installed.product),
        ("device class", manifest.device_class, installed.device_class),
        ("base model", manifest.base.sha256, installed.base.sha256),
        ("base release", manifest.base.manifest, installed.base.manifest),
    ):
        if found != expected:
            raise CheckFailed(
                f"the update is for {name} {found}, this device has {expected}", "get the update for this device"
            )


def check_sequence(manifest: Manifest, digest: str, installed: Installed) -> None:
    """The update is newer than everything ever installed, or is the newest itself, rolled back from meanwhile."""
    if manifest.seq < installed.seq or (manifest.seq == installed.seq and digest != installed.digest):
        raise CheckFailed(
            f"update {manifest.seq} is not newer than {installed.seq}",
            "get a newer update; going back takes `rollback`",
        )
    check_not_revoked(manifest.seq, installed.min_seq)


def check_not_revoked(seq: int, min_seq: int) -> None:
    """A signed update has not said that versions below `min_seq` must not run any more."""
    if seq < min_seq:
        raise CheckFailed(
            f"version {seq} is below {min_seq}, the lowest that is allowed to run", "choose a newer version"
        )


def check_time(manifest: Manifest, installed: Installed, now: int) -> None:
    """The update has not expired, by a clock that is not behind a time that was signed."""
    if not manifest.expires:
        return
    known = max(manifest.created, installed.clock)
    if max(now, known) >= manifest.expires:
        raise CheckFailed(
            f"the update expired at {manifest.expires}, it is {max(now, known)} (seconds since 1970)",
            "get a newer update",
        )
    if now < known - CLOCK_SLACK:
        raise Inconclusive(
            f"the clock says {now}, but something signed at {known} is here", "set the clock and apply again"
        )


def check_held(manifest: Manifest, installed: Installed) -> None:
    """Every update of the version is in the bundle or on the device."""
    for update in manifest.updates:
        if not update.experts and update.sha256 not in installed.held:
            raise CheckFailed(
                f"the factors of {update.task} are neither in the update nor on this device",
                "get a bundle made with a lower --since",
            )


def counts_as_try(error: BaseException) -> bool:
    """Whether a failure speaks against the update; a full disk or an interruption does not."""
    return isinstance(error, R1ExportError) and not isinstance(error, Unsupported)
