"""Install an update, or roll back. After every step either the old or the new version is active, never a mixture.

lock - read - verify - parse - policy - record the try - factors - build in a fresh process - hash again
     - sync - health check - switch `current` by one rename - record - remove what is no longer kept
"""

from __future__ import annotations

import shutil
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Iterator

from r1export.device import layouts, worker
from r1export.device.policy import check_not_revoked, check_offer, check_repair, counts_as_try
from r1export.device.slot_files import (
    Step,
    build,
    check_slot,
    is_rotten,
    is_whole,
    replace_damaged,
    store_bundle,
    write_factors,
)
from r1export.device.state import State
from r1export.device.store import BASE, Store, retire
from r1export.device.worker import Run
from r1export.errors import InputError, Unsupported
from r1export.update.atomic_io import (
    remove,
    sync_folder,
)
from r1export.update.bundle import Bundle, read_bundle

WAIT = 60.0  # seconds to wait for the lock


@dataclass(frozen=True)
class Outcome:
    """The result of `apply` or `rollback`: the active version, the previous one, and whether anything changed."""

    slot: str
    previous: str
    changed: bool


def apply(
    store: Path | str,
    bundle: Path | str,
    *,
    now: float | None = None,
    retry: bool = False,
    wait: float = WAIT,
    run: Run = worker.run,
) -> Outcome:
    """Install the update `bundle` and make it current.

    If it is already current, only corrupted files are rebuilt, and its signatures are replaced by those of `bundle`.
    `now` is in seconds since 1970 and defaults to the system clock; `retry` ignores earlier failures of this update.

    After an error the previous version is still current, unless the message says otherwise.

    Raises:
        InputError: malformed.
        CheckFailed: refused, or a check failed.
        Unsupported: no space, no onnxruntime, another update is running.
        Inconclusive: the clock is wrong.
    """
    data = read_bundle(Path(bundle))
    device = Store.open(Path(store))
    with _plain_errors(), device.lock(wait) as descriptor:
        device.sweep()
        offer = Bundle.parse(data, device.trusted(), device.config.threshold)
        previous = device.active
        _settle(device, offer.digest if retry else "")
        step = partial(run, device, descriptor)
        if offer.slot == previous:
            with _swept(device):
                return Outcome(offer.slot, previous, _repair(device, offer, step))
        clock = int(time.time() if now is None else now)
        free, needed = _space(device, offer)
        check_offer(offer.manifest, offer.digest, device.installed(), now=clock, free=free, needed=needed)
        _attempt(device, offer, previous, step)
        return Outcome(offer.slot, previous, True)


def rollback(store: Path, to: int | None = None, *, wait: float = WAIT, run: Run = worker.run) -> Outcome:
    """Switch to an older version: the newest below the current one, or the one with sequence number `to` (0: the base).

    Raises:
        InputError: no such version.   CheckFailed: it is corrupted, fails the health check, or a signed update forbids it.
    """
    device = Store.open(store)
    with _plain_errors(), device.lock(wait) as descriptor:
        device.sweep()
        previous = device.active
        _settle(device)
        slot = _choose(device, previous, to)
        if slot == previous:
            sync_folder(device.path)  # the process that switched to it may have died before the rename was synced
            return Outcome(slot, slot, False)
        state = device.state()
        check_not_revoked(_sequence(slot), state.min_seq)
        check_slot(device, slot)
        if slot != BASE:
            run(device, descriptor, "health", slot)
        try:
            device.switch(slot)
            device.write_state(replace(state, pending=""))
        except BaseException as error:
            with suppress(OSError):
                _switch_back(device, previous)
            _check_reverted(device, previous, error)
            raise
        return Outcome(slot, previous, True)


def _space(device: Store, offer: Bundle) -> tuple[int, int]:
    """Free bytes, and the bytes that installing `offer` takes: its files, the update, and its factors."""
    files = offer.manifest.nbytes if device.config.mode == "slot" else 0
    files += layouts.extra_bytes(device)
    return shutil.disk_usage(device.path).free, files + 2 * len(offer.to_bytes())


def _attempt(device: Store, offer: Bundle, previous: str, run: Step) -> None:
    """Build, check and switch; on any failure restore the previous state."""
    before = device.state()
    others = {digest: count for digest, count in before.tries.items() if digest != offer.digest}
    tries = {**others, offer.digest: before.tries.get(offer.digest, 0) + 1}
    device.write_state(
        replace(before, pending=offer.digest, tries=tries)
    )  # counts as a failed try if the machine dies below
    added: list[Path] = []
    try:
        write_factors(device, offer, added)
        if is_whole(device, offer):
            store_bundle(device, offer)
        else:
            added.append(device.folder(offer.slot))
            build(device, offer, run)
        run("health", offer.slot)
        device.switch(offer.slot)
        device.write_state(replace(before.raised(offer.manifest, offer.digest), tries=others))
    except BaseException as error:
        counted = counts_as_try(error) and not is_rotten(device, offer)
        _revert(device, previous, added, replace(before, tries=tries if counted else before.tries))
        _check_reverted(device, previous, error)
        raise
    _prune(device, offer.slot, previous)


def _repair(device: Store, offer: Bundle, run: Step) -> bool:
    """Repair the current version if needed, and store the signatures of `offer`. Returns whether anything changed."""
    factors: list[Path] = []
    write_factors(device, offer, factors)
    damaged = not is_whole(device, offer)
    if damaged:
        free, needed = _space(device, offer)
        check_repair(offer.manifest, device.installed(), free=free, needed=needed)
        replace_damaged(device, offer, run)
        run("health", offer.slot)
    renewed = store_bundle(device, offer)
    sync_folder(device.path)  # the process that switched to it may have died before the rename was synced
    return damaged or renewed or bool(factors)


def _revert(device: Store, previous: str, added: list[Path], state: State) -> None:
    """Restore the previous state. If a step fails, the next update does the rest: this one is recorded as pending."""
    with suppress(OSError):
        _switch_back(device, previous)
        for path in added:
            if path.exists():
                retire(path)
        device.sweep()
        device.write_state(state)


def _switch_back(device: Store, previous: str) -> None:
    """Make `previous` current and sync it. Otherwise `current` could name a removed version after a power cut."""
    if device.active != previous:
        if previous:
            device.switch(previous)
        else:
            remove(device.path / "current")
    sync_folder(device.path)


def _check_reverted(device: Store, previous: str, error: BaseException) -> None:
    """Raises Unsupported if `error` left another version current than before."""
    if (active := device.active) != previous:
        raise Unsupported(
            f"version {active} is current, but could neither be recorded nor reverted: {error}",
            "check disk space and permissions, then run the same command again to complete it",
        ) from error


def _settle(device: Store, forget: str = "") -> None:
    """Clean up after an interrupted update: unless it became current, remove its version. It counts as a failed try.

    `forget` names an update whose tries are not counted.
    """
    state = device.state()
    if unfinished := device.unfinished():
        sync_folder(device.path)  # otherwise `current` could name it again after a power cut
        retire(device.folder(unfinished))
    installed = state.pending if state.awaits(device.active) else ""
    tries = {digest: count for digest, count in state.tries.items() if digest not in (forget, installed)}
    if state.pending or tries != state.tries:
        device.write_state(replace(state, pending="", tries=tries))


def _prune(device: Store, slot: str, previous: str) -> None:
    """Keep the current slot, the previous one and the newest, `keep` in total. Slots that can't be removed do no harm."""
    spare = [name for name in reversed(device.slots()) if name not in (slot, previous)]
    room = max(0, device.config.keep - len({slot, previous} - {BASE, ""}))
    for name in spare[room:]:
        with suppress(OSError):
            retire(device.folder(name))


def _choose(device: Store, current: str, to: int | None) -> str:
    versions = {_sequence(slot): slot for slot in [BASE, *device.slots()]}
    if to is None:
        older = [seq for seq in versions if seq < _sequence(current)] if current else []
        if not older:
            raise InputError(
                f"no version is older than {current or 'none'}", f"choose with --to among {sorted(versions)}"
            )
        to = max(older)
    if to not in versions:
        raise InputError(f"version {to} is not on this device", f"choose with --to among {sorted(versions)}")
    return versions[to]


def _sequence(slot: str) -> int:
    return 0 if slot in ("", BASE) else int(slot.split("-")[0])


@contextmanager
def _swept(device: Store) -> Iterator[None]:
    """Sweep the store if the block fails."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            device.sweep()
        raise


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Turn an operating system's error into one line with a remedy."""
    try:
        yield
    except OSError as error:
        raise Unsupported(
            f"{error.filename or 'store'}: {error.strerror or error}",
            "the old version stays active; check disk space and permissions, then try again",
        ) from error
