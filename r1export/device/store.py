"""A device's store: the base, the versions derived from it, which one is current, and what must never be forgotten.

    STORE/store.json   what the device is: product, class, mode, keys needed     trust/*.pub   whom it believes
          base/        the base release, never written again
          slots/SEQ-HASH/   one version each: update.r1u, and in slot mode every file of the release
          current ->   base or slots/SEQ-HASH: one symlinked folder, switched by rename
          factors/     experts by the SHA-256 of their file      state.json   highest sequence, tries      lock

What `current` names is the truth. state.json only adds to it, so its loss lowers nothing that the slots still prove.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from r1export.device.policy import Installed
from r1export.errors import InputError, R1ExportError, Unsupported
from r1export.update.bundle import Bundle, read_bundle, split
from r1export.update.envelope import PublicKey
from r1export.update.factors import ExpertUpdate
from r1export.update.files import sync_folder, write_json
from r1export.update.manifest import Base, Manifest
from r1export.update.release import Release, check_file
from r1export.update.strict import parse_json

FORMAT = "r1export.store/1"
MODES = ("slot", "overlay")
BUNDLE = "update.r1u"
BASE = "base"
CONFIG = "store.json"
_SLOT = re.compile(r"[0-9]{8,16}-[0-9a-f]{16}")
_ANY = re.compile(r"(?s).{0,1000}")


@dataclass(frozen=True)
class Config:
    """What a device is, fixed by `init`. `health` is onnxruntime, none, or the command line of a check; `keep` counts slots."""

    product: str
    device_class: str
    mode: str
    health: str
    threshold: int
    keep: int
    base_manifest: str


@dataclass(frozen=True)
class State:
    """What must survive: the highest sequence with its digest, the lowest that may run, the latest signed time, failed tries."""

    seq: int = 0
    digest: str = ""
    min_seq: int = 0
    clock: int = 0
    pending: str = ""
    tries: Mapping[str, int] = field(default_factory=dict)

    def awaits(self, slot: str) -> bool:
        """Whether `slot` is the version of the update that is being installed, or was when the machine died."""
        return bool(self.pending) and slot.endswith(f"-{self.pending[:16]}")

    def raised(self, manifest: Manifest, digest: str) -> State:
        """This state after `manifest` was installed: nothing in it ever falls."""
        newer = manifest.seq > self.seq
        return replace(
            self,
            seq=max(self.seq, manifest.seq),
            digest=digest if newer else self.digest,
            min_seq=max(self.min_seq, manifest.min_seq),
            clock=max(self.clock, manifest.created),
        )


@dataclass(frozen=True)
class Store:
    """The files of one device. Readers need nothing; whoever writes holds `lock`."""

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
                f"{release.path}/manifest.json is not the one of `init`", "make the store again from the base release"
            )
        return release

    def trusted(self) -> list[PublicKey]:
        """The keys in trust/. Raises InputError if one is malformed."""
        return [PublicKey.read(path) for path in sorted((self.path / "trust").glob("*.pub"))]

    @property
    def active(self) -> str:
        """Name of the current slot, `base`, or nothing if `current` names neither."""
        try:
            target = os.readlink(self.path / "current")
        except OSError:
            return ""
        name = target.removeprefix("slots/")
        known = name == BASE or _SLOT.fullmatch(name)
        return name if known and target == _target(name) else ""  # a link to anywhere else is not ours

    @property
    def current(self) -> str:
        """Name of the current slot, or `base`. Raises InputError if `current` names neither."""
        if not (name := self.active):
            raise InputError(f"{self.path}/current names no version", "run `rollback --to SEQ` to choose one")
        return name

    def folder(self, slot: str) -> Path:
        """Where a version lies."""
        return self.path / BASE if slot == BASE else self.path / "slots" / slot

    def slots(self) -> list[str]:
        """Names of the versions on the device but the base, lowest sequence first."""
        return sorted(path.name for path in (self.path / "slots").iterdir() if _SLOT.fullmatch(path.name))

    def unfinished(self) -> str:
        """The slot of an update that was interrupted before it became current, or nothing.

        It proves nothing and may not be chosen; whoever next holds the lock removes it.
        """
        state = self._recorded()
        if state.pending == state.digest:  # an installed version that was being applied again
            return ""
        return next((slot for slot in self.slots() if state.awaits(slot) and slot != self.active), "")

    def bundle(self, slot: str) -> Bundle:
        """The update that a slot was made from; it was verified when it was installed, now only its identity is checked.

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
        """Where the experts with this digest are kept."""
        return self.path / "factors" / f"{sha256}.safetensors"

    def _held(self, sha256: str) -> ExpertUpdate:
        check_file(self.factors_path(sha256), sha256)
        return ExpertUpdate.read(self.factors_path(sha256))

    def state(self) -> State:
        """state.json, raised to what the installed versions prove. A missing or damaged file counts as empty."""
        state, unfinished = self._recorded(), self.unfinished()
        for slot in self.slots():
            if slot == unfinished:
                continue
            try:
                bundle = self.bundle(slot)
            except R1ExportError:
                continue  # doctor names it; the others still count
            state = state.raised(bundle.manifest, bundle.digest)
        return state

    def _recorded(self) -> State:
        try:
            return read_state(self.path / "state.json")
        except R1ExportError:
            return State()

    def write_state(self, state: State) -> None:
        """Replace state.json atomically and make it, and every rename before it in the store's folder, survive a power cut."""
        body = asdict(state)
        write_json(self.path / "state.json", {"state": body, "sha256": _digest(body)})

    def installed(self) -> Installed:
        """What the policy needs to know about this device."""
        base, state = self.base(), self.state()
        return Installed(
            product=self.config.product,
            device_class=self.config.device_class,
            base=Base(base.base_name, base.base_sha256, base.manifest_sha256),
            seq=state.seq,
            digest=state.digest,
            min_seq=state.min_seq,
            clock=state.clock,
            held=frozenset(
                path.name.removesuffix(".safetensors") for path in (self.path / "factors").glob("*.safetensors")
            ),
            tries=state.tries,
        )

    def switch(self, slot: str) -> None:
        """Make `slot` the current one with a single rename; `write_state` makes it survive a power cut."""
        sync_folder(self.path / "slots")  # whoever gave the slot its name may have died before that was certain
        temporary = self.path / ".current.partial"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(_target(slot))
        os.replace(temporary, self.path / "current")

    def sweep(self) -> None:
        """Remove what an interrupted update left behind."""
        for folder in (self.path, self.path / "slots", self.path / "factors"):
            for path in folder.glob(".*.partial"):
                remove(path)

    @contextmanager
    def lock(self, wait: float) -> Iterator[int]:
        """Hold the store's lock; yields its descriptor. Raises Unsupported if another updater has it for `wait` seconds."""
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            deadline = time.monotonic() + wait
            while not _locked(descriptor):
                if time.monotonic() > deadline:
                    raise Unsupported(f"another update of {self.path} is running", "wait for its end and try again")
                time.sleep(0.02)
            yield descriptor
        finally:
            os.close(descriptor)


def _target(slot: str) -> str:
    """What `current` says where `slot` is the current one."""
    return BASE if slot == BASE else f"slots/{slot}"


def write_config(folder: Path, config: Config) -> None:
    """Write store.json with a digest of itself: one flipped bit could make one signature of three enough."""
    body = {"format": FORMAT, **asdict(config)}
    write_json(folder / CONFIG, {**body, "sha256": _digest(body)})


def read_config(path: Path) -> Config:
    """Read store.json, also one without a digest, as the first kit wrote it. Raises InputError if it is missing or damaged."""
    try:
        fields = parse_json(path.read_bytes(), str(path), 1 << 20)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path.parent} is no store: it has no {CONFIG}", "make one with `init`") from None
    form = fields.text("format", re.compile(re.escape(FORMAT)))
    config = Config(
        product=fields.text("product", _ANY),
        device_class=fields.text("device_class", _ANY),
        mode=fields.text("mode", re.compile("|".join(MODES))),
        health=fields.text("health", _ANY),
        threshold=fields.integer("threshold", 1),
        keep=fields.integer("keep", 1),
        base_manifest=fields.digest("base_manifest"),
    )
    if "sha256" in fields and fields.digest("sha256") != _digest({"format": form, **asdict(config)}):
        raise InputError(f"{path} is damaged", "make a new store with `init` from the base release")
    fields.done()  # a flipped bit in the name of the digest's member must not make it an old file
    return config


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def read_state(path: Path) -> State:
    """Read state.json. Raises InputError if it is missing or damaged."""
    try:
        fields = parse_json(path.read_bytes(), str(path), 1 << 20)
    except FileNotFoundError:
        raise InputError(f"{path} is missing", "the next update writes it again") from None
    digest, body = fields.digest("sha256"), fields.object("state")
    tries = body.object("tries")
    state = State(
        seq=body.integer("seq"),
        digest=body.text("digest", _ANY),
        min_seq=body.integer("min_seq"),
        clock=body.integer("clock"),
        pending=body.text("pending", _ANY),
        tries={name: tries.integer(name) for name in tries},
    )
    if _digest(asdict(state)) != digest:
        raise InputError(f"{path} is damaged", "the next update writes it again")
    return state


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def retire(path: Path) -> None:
    """Take a name away for good and only then what it names, so that after a power cut too what is there is whole."""
    hidden = path.with_name(f".{path.name}.partial")
    path.rename(hidden)
    sync_folder(path.parent)
    remove(hidden)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all it holds, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_new(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file that does not exist yet and sync its data; the caller syncs the folder. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    with os.fdopen(descriptor, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(descriptor)
