"""Take an update, or go back: every step leaves either the old version active or the new one, never a mixture.

lock - read - verify - parse - policy - record the try - factors - build in a fresh process - hash again
     - sync - health check - switch `current` by one rename - record - remove what is no longer kept
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from r1export.device import worker
from r1export.device.policy import check_not_revoked, check_offer, counts_as_try
from r1export.device.state import State
from r1export.device.store import BASE, BUNDLE, Store, retire, write_new
from r1export.errors import CheckFailed, InputError, R1ExportError, Unsupported
from r1export.update.atomic_io import sha256_file, sync_folder
from r1export.update.bundle import Bundle, read_bundle
from r1export.update.release_manifest import check_file

WAIT = 60.0  # seconds that an updater waits for another one
Run = Callable[[Store, int, str, str], None]  # (store, descriptor to inherit, verb, name of the folder in slots/)


@dataclass(frozen=True)
class Outcome:
    """What `apply` or `rollback` did: the version that is active now, the one before, and whether anything changed."""

    slot: str
    previous: str
    changed: bool


def apply(
    store: Path,
    bundle: Path,
    *,
    now: float | None = None,
    retry: bool = False,
    wait: float = WAIT,
    run: Run = worker.run,
) -> Outcome:
    """Install the update `bundle` and make it current. Nothing changes if it is current already.

    `now` is the time in seconds since 1970, by default the clock's; `retry` forgets earlier failures of this update.

    Raises:
        InputError: malformed.   CheckFailed: refused, or a check did not hold.
        Unsupported: no space, no onnxruntime, another updater.   Inconclusive: the clock is wrong.
        Whatever is raised, the version that was current is current still, unless the message says that it is not.
    """
    data = read_bundle(bundle)
    device = Store.open(store)
    with _plain_errors(), device.lock(wait) as descriptor:
        device.sweep()
        offer = Bundle.parse(data, device.trusted(), device.config.threshold)
        previous = device.current
        _settle(device, offer.digest if retry else "")
        if offer.slot == previous:
            return _unchanged(device, previous)
        needed = offer.manifest.nbytes if device.config.mode == "slot" else 0
        free = shutil.disk_usage(device.path).free
        clock = int(time.time() if now is None else now)
        check_offer(
            offer.manifest, offer.digest, device.installed(), now=clock, free=free, needed=needed + 2 * len(data)
        )
        _attempt(device, offer, previous, lambda verb, name: run(device, descriptor, verb, name))
        return Outcome(offer.slot, previous, True)


def rollback(store: Path, to: int | None = None, *, wait: float = WAIT, run: Run = worker.run) -> Outcome:
    """Make an older version on the device current again: the newest below the current one, or that of sequence `to` (0: the base).

    Raises:
        InputError: no such version.   CheckFailed: it is damaged, unhealthy, or a signed update forbade it.
    """
    device = Store.open(store)
    with _plain_errors(), device.lock(wait) as descriptor:
        device.sweep()
        previous = device.active
        _settle(device)
        slot = _choose(device, previous, to)
        if slot == previous:
            return _unchanged(device, slot)
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


def _attempt(device: Store, offer: Bundle, previous: str, run: Callable[[str, str], None]) -> None:
    """Build, check and switch; on any failure put everything back as it was."""
    before = device.state()
    others = {digest: count for digest, count in before.tries.items() if digest != offer.digest}
    tries = {**others, offer.digest: before.tries.get(offer.digest, 0) + 1}
    device.write_state(replace(before, pending=offer.digest, tries=tries))  # a machine that dies below finds this count
    added: list[Path] = []
    try:
        _write_factors(device, offer, added)
        if not _reusable(device, offer.slot):
            added.append(device.folder(offer.slot))
            _build(device, offer, run)
        run("health", offer.slot)
        device.switch(offer.slot)
        device.write_state(replace(before.raised(offer.manifest, offer.digest), tries=others))
    except BaseException as error:
        counted = counts_as_try(error) and not _rotten(device, offer)
        _revert(device, previous, added, replace(before, tries=tries if counted else before.tries))
        _check_reverted(device, previous, error)
        raise
    _prune(device, offer.slot, previous)


def _build(device: Store, offer: Bundle, run: Callable[[str, str], None]) -> None:
    """Make the slot under a hidden name, hash what was written, sync it, and only then give it its name."""
    partial = device.path / "slots" / f".{offer.slot}.partial"
    partial.mkdir()
    write_new(partial / BUNDLE, [offer.to_bytes()])
    run("build", partial.name)
    if device.config.mode == "slot":
        for file in offer.manifest.files:
            if (found := sha256_file(partial / file.path)) != file.sha256:
                raise CheckFailed(
                    f"{file.path} came out with SHA-256 {found}, signed is {file.sha256}",
                    "have the update made again for this base",
                )
    for folder in [partial, *partial.rglob("*")]:
        if folder.is_dir():
            sync_folder(folder)
    partial.rename(device.folder(offer.slot))


def _write_factors(device: Store, offer: Bundle, added: list[Path]) -> None:
    for sha256, update in offer.carried.items():
        path = device.factors_path(sha256)
        if path.is_file() and sha256_file(path) == sha256:
            continue
        partial = path.with_name(f".{path.name}.partial")
        write_new(partial, [update.to_bytes()])
        added.append(path)
        partial.rename(path)
    sync_folder(device.path / "factors")  # also for those that were there: an updater may have died before this


def _rotten(device: Store, offer: Bundle) -> bool:
    """Whether the base or factors that the update builds on are damaged, which is no fault of the update."""
    try:
        device.base().check()
        for update in offer.manifest.updates:
            if not update.experts:
                check_file(device.factors_path(update.sha256), update.sha256)
    except (R1ExportError, OSError):
        return True
    return False


def _revert(device: Store, previous: str, added: list[Path], state: State) -> None:
    """Put the store back as it was. Where a step fails the rest waits for the next update, which finds this one pending."""
    with suppress(OSError):
        _switch_back(device, previous)
        for path in added:
            if path.exists():
                retire(path)
        device.sweep()
        device.write_state(state)


def _switch_back(device: Store, previous: str) -> None:
    """Make `previous` current for good: before that, after a power cut `current` could name what is removed next."""
    if previous and device.active != previous:
        device.switch(previous)
    sync_folder(device.path)


def _check_reverted(device: Store, previous: str, error: BaseException) -> None:
    """Raises Unsupported if after `error` another version than before is current."""
    if (active := device.active) != previous:
        raise Unsupported(
            f"version {active} is current, which could neither be recorded nor taken back: {error}",
            "see to the disk, then do the same again: that completes it",
        ) from error


def _unchanged(device: Store, slot: str) -> Outcome:
    """The answer where `slot` is current already: for good, should whoever switched to it have died before that was certain."""
    sync_folder(device.path)
    return Outcome(slot, slot, False)


def _settle(device: Store, forget: str = "") -> None:
    """Close the account of an update that was interrupted: unless it became current its version goes, its try stays counted.

    `forget` names an update whose tries do not.
    """
    state = device.state()
    if unfinished := device.unfinished():
        sync_folder(device.path)  # else a power cut could bring back a `current` that names it
        retire(device.folder(unfinished))
    installed = state.pending if state.awaits(device.active) else ""
    tries = {digest: count for digest, count in state.tries.items() if digest not in (forget, installed)}
    if state.pending or tries != state.tries:
        device.write_state(replace(state, pending="", tries=tries))


def _reusable(device: Store, slot: str) -> bool:
    """Whether the slot is there and whole; a damaged one is removed."""
    if not device.folder(slot).is_dir():
        return False
    try:
        check_slot(device, slot)
    except R1ExportError:
        retire(device.folder(slot))
        return False
    return True


def check_slot(device: Store, slot: str) -> None:
    """Verify a version as if it had just arrived, with today's keys, and hash all that it is made of.

    Raises:
        InputError, CheckFailed: damaged, or signed by keys that are trusted no more.
    """
    if slot == BASE:
        return device.base().check()
    bundle = Bundle.parse(read_bundle(device.folder(slot) / BUNDLE), device.trusted(), device.config.threshold)
    if bundle.slot != slot:
        raise CheckFailed(f"{device.folder(slot)} holds version {bundle.slot}", "apply the update again")
    device.update(bundle)
    if device.config.mode == "slot":
        for file in bundle.manifest.files:
            check_file(device.folder(slot) / file.path, file.sha256)
    return None


def _prune(device: Store, slot: str, previous: str) -> None:
    """Keep the current slot, the one before and the newest, `keep` in all; failures leave a slot more, which does no harm."""
    spare = [name for name in reversed(device.slots()) if name not in (slot, previous)]
    room = max(0, device.config.keep - len({slot, previous} - {BASE}))
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
def _plain_errors() -> Iterator[None]:
    """Turn an operating system's error into one line with a remedy."""
    try:
        yield
    except OSError as error:
        raise Unsupported(
            f"{error.filename or 'store'}: {error.strerror or error}",
            "the old version stays active; see to the disk and try again",
        ) from error
