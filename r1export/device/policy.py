"""The rules for accepting an update, as pure functions: no files, no clock.

The first failed rule rejects the update with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from r1export.errors import CheckFailed, Inconclusive, R1ExportError, Unsupported
from r1export.update.manifest import Base, Manifest

MAX_TRIES = 3  # tries before an update is given up
CLOCK_SLACK = 86_400  # seconds that a device's clock may lag behind the signing time
RESERVE = 4 << 20  # bytes to keep free on the device
# Largest allowed jump of the sequence number. Without a limit, one update with the number
# 2^53 - 1 leaves no higher one, for ever, even if its key is revoked; in steps of a million that takes nine billion updates.
MAX_SEQ_JUMP = 1_000_000


@dataclass(frozen=True)
class Installed:
    """The state of a device.

    `seq` is the highest number ever installed and `digest` its manifest's, `min_seq` the lowest that may run, `clock` the
    latest signed time seen (seconds since 1970), `held` the digests of the factors it has, `tries` the failures of each update.
    """

    product: str
    device_class: str
    base: Base
    seq: int = 0
    digest: str = ""
    min_seq: int = 0
    max_seq_jump: int = MAX_SEQ_JUMP
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
            "fix the cause, then apply it with --retry",
        )
    check_space(free, needed)


def check_repair(manifest: Manifest, installed: Installed, *, free: int, needed: int) -> None:
    """Accept the update as the source for repairing the current version, or raise.

    Its age, expiry and failures don't matter: the version is already running, and there may be no other one.

    Raises:
        CheckFailed: meant for another device, forbidden since, or without factors that the device lacks.
        Unsupported: no space.
    """
    check_target(manifest, installed)
    check_not_revoked(manifest.seq, installed.min_seq)
    check_held(manifest, installed)
    check_space(free, needed)


def check_target(manifest: Manifest, installed: Installed) -> None:
    """The update is for this product, this device class and this base."""
    for name, offered, own in (
        ("product", manifest.product, installed.product),
        ("device class", manifest.device_class, installed.device_class),
        ("base model", manifest.base.sha256, installed.base.sha256),
        ("base release", manifest.base.manifest, installed.base.manifest),
    ):
        if offered != own:
            raise CheckFailed(
                f"the update is for {name} {offered}, this device has {own}", "use the update for this device"
            )


def check_sequence(manifest: Manifest, digest: str, installed: Installed) -> None:
    """The update is newer than everything ever installed, within the allowed jump; or it is the newest, after a rollback."""
    if manifest.seq < installed.seq or (manifest.seq == installed.seq and digest != installed.digest):
        raise CheckFailed(
            f"update {manifest.seq} is not newer than {installed.seq}",
            "use a newer update, or `rollback` to go back",
        )
    check_not_revoked(manifest.seq, installed.min_seq)
    highest = max(installed.seq, installed.min_seq)
    if manifest.seq > highest + installed.max_seq_jump:
        raise CheckFailed(
            f"the sequence number {manifest.seq} is more than {installed.max_seq_jump} above {highest}",
            "build it with a lower --seq, or create a new store with a larger --max-seq-jump",
        )


def check_not_revoked(seq: int, min_seq: int) -> None:
    """No signed update has forbidden the version by raising `min_seq`."""
    if seq < min_seq:
        raise CheckFailed(f"version {seq} is below {min_seq}, the lowest allowed version", "choose a newer version")


def check_time(manifest: Manifest, installed: Installed, now: int) -> None:
    """The update has not expired, by a clock that is not behind a signed time."""
    if not manifest.expires:
        return
    latest = max(manifest.created, installed.clock)
    if is_expired(manifest, installed.clock, now):
        raise CheckFailed(
            f"the update expired at {manifest.expires}, the time is {max(now, latest)} (seconds since 1970)",
            "use a newer update",
        )
    if now < latest - CLOCK_SLACK:
        raise Inconclusive(
            f"the clock is at {now}, before the signing time {latest} of an update",
            "set the clock and apply the update again",
        )


def is_expired(manifest: Manifest, clock: int, now: int) -> bool:
    """Whether the later of the device's clock `now` and the latest signed time (`clock`, `created`) has reached `expires`."""
    return bool(manifest.expires) and max(now, clock, manifest.created) >= manifest.expires


def check_space(free: int, needed: int) -> None:
    """`needed` bytes can be written, and a reserve stays free."""
    if free < needed + RESERVE:
        raise Unsupported(f"{free} bytes free, {needed + RESERVE} needed", "free space, or use a store in overlay mode")


def check_held(manifest: Manifest, installed: Installed) -> None:
    """The factors of every update are in the bundle or on the device."""
    for update in manifest.updates:
        if not update.experts and update.sha256 not in installed.held:
            raise CheckFailed(
                f"the factors of {update.task} are neither in the update nor on this device",
                "use a bundle with a lower --since",
            )


def counts_as_try(error: BaseException) -> bool:
    """Whether a failure counts against the update; a full disk or an interruption does not."""
    return isinstance(error, R1ExportError) and not isinstance(error, Unsupported)
