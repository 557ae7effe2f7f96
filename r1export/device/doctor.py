"""The status of a device, and checks of its store for corruption, each with its repair."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from r1export.device.arithmetic import known_answers_hold
from r1export.device.client_files import unchecked_tokenizer
from r1export.device.policy import is_expired
from r1export.device.slot_files import check_slot
from r1export.device.state import CONFIG, STATE, read_state
from r1export.device.store import BASE, Store
from r1export.device.version import version_in
from r1export.errors import CheckFailed, InputError, R1ExportError, refused
from r1export.update.release_manifest import check_file

FRESH = "create a new store with `init` from the base release (--min-seq keeps the lowest allowed version), then apply the newest update"
AGAIN = "apply the same update again, signed with keys that are trusted now: only corrupted files are rebuilt"


@dataclass(frozen=True)
class Finding:
    """The result of one check. `fault` is empty if it passed, `remedy` says how to repair it.

    `note` says why it could not be checked, which is not a fault.
    """

    name: str
    fault: str = ""
    remedy: str = ""
    note: str = ""


@dataclass(frozen=True)
class Status:
    """The identity and the versions of a device. Times are seconds since 1970 UTC, None if the current version has none.

    `expired`: the current version should have been replaced by now; it keeps running.
    """

    store: str
    product: str
    device_class: str
    mode: str
    current: str
    name: str
    seq: int
    tasks: tuple[str, ...]
    created: int | None
    expires: int | None
    expired: bool
    highest_seq: int
    min_seq: int
    versions: tuple[str, ...]
    interrupted: str
    failed: Mapping[str, int]


def status(store: Path, *, now: float | None = None) -> Status:
    """The status of a device; `now` defaults to the system clock.

    Raises InputError if there is no store, or the current version's update is corrupted.
    """
    device = Store.open(store)
    state, current, unfinished = device.state(), device.current, device.unfinished()
    manifest = None if current == BASE else device.bundle(current).manifest
    clock = int(time.time() if now is None else now)
    return Status(
        store=str(store),
        product=device.config.product,
        device_class=device.config.device_class,
        mode=device.config.mode,
        current=current,
        name=manifest.name if manifest else BASE,
        seq=manifest.seq if manifest else 0,
        tasks=tuple(update.task for update in manifest.updates) if manifest else (),
        created=manifest.created if manifest else None,
        expires=(manifest.expires or None) if manifest else None,
        expired=manifest is not None and is_expired(manifest, state.clock, clock),
        highest_seq=state.seq,
        min_seq=state.min_seq,
        versions=(BASE, *(slot for slot in device.slots() if slot != unfinished)),
        interrupted=state.pending,
        failed=dict(state.tries),
    )


def doctor(store: Path) -> list[Finding]:
    """Check every part of the store without changing it. Raises InputError if there is no store."""
    try:
        device = Store.open(store)
    except InputError as error:
        if not (store / CONFIG).is_file():
            raise
        return [Finding(CONFIG, error.message, FRESH)]  # the other checks need store.json
    found = [_look(name, remedy, check) for name, remedy, check in _checks(device)]
    return [Finding(CONFIG), *found, *_unchecked(device)]


def _look(name: str, remedy: str, check: Callable[[], object]) -> Finding:
    try:
        check()
    except (R1ExportError, OSError) as error:
        fault = error if isinstance(error, R1ExportError) else refused(error)
        return Finding(name, fault.message, remedy)
    return Finding(name)


def _checks(device: Store) -> Iterator[tuple[str, str, Callable[[], object]]]:
    yield "arithmetic", "run in a fresh process and check the processor's floating-point mode", known_answers_hold
    yield "trusted keys", "copy the fleet's public keys to trust/ again", lambda: _check_keys(device)
    yield "base", FRESH, lambda: check_slot(device, BASE)
    yield (
        "state.json",
        "nothing to do: the next update recreates it from the installed versions",
        lambda: read_state(device.path / STATE),
    )
    yield (
        "current",
        "choose a version with `rollback --to SEQ`, or apply the newest update again",
        lambda: _check_current(device),
    )
    for slot in device.slots():
        yield f"slots/{slot}", AGAIN, partial(check_slot, device, slot)
    for path in sorted((device.path / "factors").glob("*.safetensors")):
        name = path.stem
        yield f"factors/{path.name}", "apply a newer update, made with --since 0", partial(check_file, path, name)
    yield "leftovers", "nothing to do: the next update removes them", lambda: _check_leftovers(device)


def _unchecked(device: Store) -> Iterator[Finding]:
    """What the health check skips on this device. Corruption is found by the other checks."""
    if device.config.health == "onnxruntime":
        with suppress(R1ExportError, OSError):
            if note := unchecked_tokenizer(version_in(device, device.current)):
                yield Finding("tokenizer", note=note)


def _check_keys(device: Store) -> None:
    keys = device.trusted()
    if len(set(keys)) < device.config.threshold:
        raise CheckFailed(f"{len(set(keys))} keys, {device.config.threshold} signatures are required")
    names = {path.name for path in (device.path / "trust").iterdir()}
    if strange := names ^ {f"{key.keyid}.pub" for key in keys}:
        raise CheckFailed(f"trust/{sorted(strange)[0]} is not named after its key id")


def _check_current(device: Store) -> None:
    if not device.folder(device.current).is_dir():
        raise InputError(f"{device.path}/current points to {device.current}, which does not exist")


def _check_leftovers(device: Store) -> None:
    names = [path.name for path in device.leftovers()]
    if unfinished := device.unfinished():
        names.append(f"slots/{unfinished}")
    if names:
        raise CheckFailed(f"an interrupted update left {', '.join(sorted(names))[:300]}")
