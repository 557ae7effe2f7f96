"""A device store: the base, the versions derived from it, the current one, and the persistent state.

    STORE/store.json   configuration: product, class, mode, threshold     trust/*.pub   trusted keys
          base/        the base release, never written again
          slots/SEQ-HASH/   one version: update.r1u, and in slot mode every file of the release
          current ->   base or slots/SEQ-HASH: one symlinked folder, switched by rename
          factors/     experts by the SHA-256 of their file      state.json   highest sequence, tries      lock

`current` is authoritative. state.json only adds to it, so losing it lowers nothing that the slots still prove.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from r1export.device import state as state_files
from r1export.device.policy import Installed
from r1export.device.state import CONFIG, STATE, Config, State, read_config, read_state
from r1export.errors import CheckFailed, InputError, R1ExportError, Unsupported
from r1export.update.atomic_io import FILE_MODE, inside, read_regular, remove, sha256_bytes, sync_folder
from r1export.update.bundle import MAX_BUNDLE, Bundle, read_bundle, split
from r1export.update.envelope import PublicKey
from r1export.update.factors import ExpertUpdate
from r1export.update.manifest import Base, Manifest
from r1export.update.release_manifest import Release

BUNDLE = "update.r1u"
BASE = "base"
LOCK_MODE = 0o600
_PARTIAL = ".*.partial"
_SLOT = re.compile(r"[0-9]{8,16}-[0-9a-f]{16}")


@dataclass(frozen=True)
class Store:
    """The files of one device. Readers need no lock; writers hold `lock`."""

    path: Path
    config: Config

    @classmethod
    def open(cls, path: Path) -> Store:
        """Raises InputError if there is no store at `path`, or its store.json is damaged."""
        return cls(path, read_config(path / CONFIG))

    def base(self) -> Release:
        """The base release. Raises InputError if its manifest is damaged."""
        release = Release.read(self.path / BASE)
        if release.manifest_sha256 != self.config.base_manifest:
            raise InputError(
                f"{release.path}/manifest.json differs from the one at `init`",
                "create the store again from the base release",
            )
        return release

    def trusted(self) -> list[PublicKey]:
        """The keys in trust/. Raises InputError if one is malformed."""
        return [PublicKey.read(path) for path in sorted((self.path / "trust").glob("*.pub"))]

    @property
    def active(self) -> str:
        """Name of the current slot, or `base`; empty if `current` points to neither."""
        try:
            target = os.readlink(self.path / "current")
        except OSError:
            return ""
        name = target.rpartition("/")[2]
        known = name == BASE or _SLOT.fullmatch(name)
        return name if known and target == _target(name) else ""  # a link to anywhere else is not ours

    @property
    def current(self) -> str:
        """Name of the current slot, or `base`. Raises InputError if `current` points to neither."""
        if not (name := self.active):
            raise InputError(f"{self.path}/current points to no version", "run `rollback --to SEQ` to choose one")
        return name

    def folder(self, slot: str) -> Path:
        """The folder of a version. Raises InputError if it leads out of the store."""
        return inside(self.path, _target(slot))

    def slots(self) -> list[str]:
        """Names of the installed versions except the base, lowest sequence number first."""
        return sorted(path.name for path in (self.path / "slots").glob("*") if _SLOT.fullmatch(path.name))

    def unfinished(self) -> str:
        """The slot of an update that was interrupted before it became current, or nothing.

        It can't be chosen; the next holder of the lock removes it.
        """
        state = self._recorded()
        if state.pending == state.digest:  # an installed version that was being applied again
            return ""
        return next((slot for slot in self.slots() if state.awaits(slot) and slot != self.active), "")

    def bundle(self, slot: str) -> Bundle:
        """The update of a slot. It was verified at installation; only its identity is checked now.

        Raises:
            InputError, CheckFailed: damaged since.
        """
        envelope, manifest, payload = split(read_bundle(self.folder(slot) / BUNDLE))
        bundle = Bundle(envelope, manifest, payload, Manifest.parse(manifest), ())
        if bundle.slot != slot or hashlib.sha256(payload).hexdigest() != bundle.manifest.payload_sha256:
            raise InputError(f"{self.folder(slot)}/{BUNDLE} is damaged", "apply the update again, or roll back")
        return bundle

    def update(self, bundle: Bundle) -> ExpertUpdate:
        """All experts of a version, in the order of its manifest: from the bundle, else from factors/.

        Raises:
            InputError, CheckFailed: factors are missing or damaged.
        """
        return ExpertUpdate.stack(
            bundle.carried.get(update.sha256) or self._held(update.sha256) for update in bundle.manifest.updates
        )

    def factors_path(self, sha256: str) -> Path:
        """The file of the experts with this digest. Raises InputError if it leads out of the store."""
        return inside(self.path, f"factors/{sha256}.safetensors")

    def _held(self, sha256: str) -> ExpertUpdate:
        path = self.factors_path(sha256)
        remedy = "apply an update that contains it: one with a lower --since"
        try:
            data = read_regular(path, MAX_BUNDLE)
        except FileNotFoundError:
            raise CheckFailed(f"{path} is missing", remedy) from None
        if (found := sha256_bytes(data)) != sha256:
            raise CheckFailed(f"{path} is damaged: SHA-256 {found}, expected {sha256}", remedy)
        return ExpertUpdate.parse(data, path)

    def state(self) -> State:
        """state.json, raised to what store.json and the installed versions prove. A missing or corrupted file counts as empty."""
        state, unfinished = self._recorded(), self.unfinished()
        state = replace(state, min_seq=max(state.min_seq, self.config.min_seq))
        for slot in self.slots():
            if slot == unfinished:
                continue
            try:
                bundle = self.bundle(slot)
            except R1ExportError:
                continue  # doctor reports it; the others still count
            state = state.raised(bundle.manifest, bundle.digest)
        return state

    def _recorded(self) -> State:
        try:
            return read_state(self.path / STATE)
        except (R1ExportError, OSError):  # also an unreadable file: the next update recreates it
            return State()

    def write_state(self, state: State) -> None:
        """Replace state.json atomically, and sync it and all earlier renames in the store's folder."""
        state_files.write_state(self.path / STATE, state)

    def installed(self) -> Installed:
        """The input of the policy."""
        base, state = self.base(), self.state()
        return Installed(
            product=self.config.product,
            device_class=self.config.device_class,
            base=Base(base.manifest.base.name, base.manifest.base.sha256, base.manifest_sha256),
            seq=state.seq,
            digest=state.digest,
            min_seq=state.min_seq,
            max_seq_jump=self.config.max_seq_jump,
            clock=state.clock,
            held=frozenset(path.stem for path in (self.path / "factors").glob("*.safetensors")),
            tries=state.tries,
        )

    def switch(self, slot: str) -> None:
        """Make `slot` the current one with a single rename; `write_state` makes it survive a power cut."""
        sync_folder(self.path / "slots")  # the process that renamed the slot may have died before the rename was synced
        temporary = self.path / ".current.partial"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(_target(slot))
        os.replace(temporary, self.path / "current")

    def leftovers(self) -> list[Path]:
        """Files of an interrupted update: hidden ones that were to be renamed."""
        slots, factors = self.path / "slots", self.path / "factors"
        return sorted([*self.path.glob(_PARTIAL), *slots.rglob(_PARTIAL), *factors.glob(_PARTIAL)])

    def sweep(self) -> None:
        """Remove the files of an interrupted update."""
        for path in self.leftovers():
            remove(path)

    @contextmanager
    def lock(self, wait: float) -> Iterator[int]:
        """Hold the store's lock; yields its descriptor. Raises Unsupported if another updater has it for `wait` seconds.

        The file is accessible to its owner only: any process that can open it can hold the lock and block all updates.
        """
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, LOCK_MODE)
        try:
            if (
                stat.S_IMODE(os.fstat(descriptor).st_mode) != LOCK_MODE
            ):  # written by an older kit or under another umask
                os.fchmod(descriptor, LOCK_MODE)
            deadline = time.monotonic() + wait
            while not _locked(descriptor):
                if time.monotonic() > deadline:
                    raise Unsupported(f"another update of {self.path} is running", "wait until it ends and try again")
                time.sleep(0.02)
            yield descriptor
        finally:
            os.close(descriptor)


def _target(slot: str) -> str:
    """What `current` says where `slot` is the current one."""
    return BASE if slot == BASE else f"slots/{slot}"


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def retire(path: Path) -> None:
    """Remove a folder by syncing a rename first, so that a partially deleted one never has its name, even after a power cut."""
    hidden = path.with_name(f".{path.name}.partial")
    path.rename(hidden)
    sync_folder(path.parent)
    remove(hidden)


def write_new(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file that does not exist yet and sync its data; the caller syncs the folder. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    with os.fdopen(descriptor, "wb") as file:
        path.chmod(FILE_MODE)  # independent of the umask
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(descriptor)
