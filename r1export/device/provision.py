"""Create a device store from a base release and the trusted keys."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from r1export.device import layouts, worker
from r1export.device.policy import MAX_SEQ_JUMP
from r1export.device.state import CONFIG, MODES, Config, State, write_config
from r1export.device.store import BASE, Store
from r1export.device.worker import Run, has_onnxruntime, health_command
from r1export.errors import CheckFailed, InputError, R1ExportError, Unsupported
from r1export.update.atomic_io import (
    inside,
    make_folder,
    new_folder,
    read_chunks,
    sync_folder,
    write_file,
)
from r1export.update.envelope import PublicKey
from r1export.update.names import DIGEST, NAME
from r1export.update.release_layout import MANIFEST
from r1export.update.release_manifest import Release
from r1export.update.strict_json import MAX_INTEGER

MAX_KEEP = 1000


def init(
    store: Path,
    base: Path,
    trust: Sequence[Path],
    *,
    product: str = "default",
    device_class: str = "default",
    mode: str = "slot",
    health: str = "onnxruntime",
    threshold: int = 1,
    keep: int = 2,
    max_seq_jump: int = MAX_SEQ_JUMP,
    min_seq: int = 0,
    base_sha256: str = "",
    layout: Sequence[Path] = (),
    run: Run = worker.run,
) -> Store:
    """Create a store from a base release and public keys; the base is its first version.

    `base_sha256` is the expected digest of the base's manifest.json; without it, any base is accepted. With `health`
    onnxruntime the base has to reproduce its golden outputs. A health command is not run, since a store can be created on
    another machine. Each folder of `layout`, a client layout of the base, is replaced by a link to that of the current version.

    Raises:
        InputError: the store exists, the release is not a base, a layout is of another release, or an argument is invalid.
        CheckFailed: the release is another one or corrupted, or fails the health check. No store is left behind.
        Unsupported: `health` is onnxruntime, which is not installed.
    """
    if store.exists():
        raise InputError(f"{store} exists", "choose another folder, or use `apply` to update the store")
    keys = {PublicKey.read(path) for path in trust}
    release = _read_base(base, base_sha256)
    config = Config(
        product,
        device_class,
        mode,
        health,
        threshold,
        keep,
        base_manifest=release.manifest_sha256,
        max_seq_jump=max_seq_jump,
        min_seq=min_seq,
    )
    _check_config(config, len(keys))
    taken = layouts.take(layout, release.manifest_sha256, mode)
    with new_folder(store) as folder:
        device = Store(folder, config)
        _fill(device, release, keys)
        layouts.add(device, taken)
        _check_health(device, run)
    layouts.hand_over(store, taken)
    return Store(store, config)


def _check_config(config: Config, keys: int) -> None:
    for name, value in (("product", config.product), ("device class", config.device_class)):
        if not NAME.fullmatch(value):
            raise InputError(f"{name} {ascii(value)[:100]}", "use letters, digits and ._+-")
    if config.mode not in MODES or not 1 <= config.keep <= MAX_KEEP or not 1 <= config.threshold <= keys:
        raise InputError(
            f"mode {config.mode}, {config.threshold} of {keys} keys, keep {config.keep}",
            f"mode is {' or '.join(MODES)}; need 1 <= threshold <= keys, 1 <= keep <= {MAX_KEEP}",
        )
    if not 1 <= config.max_seq_jump <= MAX_INTEGER or not 0 <= config.min_seq <= MAX_INTEGER:
        raise InputError(
            f"max-seq-jump {config.max_seq_jump}, min-seq {config.min_seq}",
            f"max-seq-jump is 1 to {MAX_INTEGER}, min-seq 0 or more",
        )
    health_command(config.health)
    if len(config.health) > 1000 or not config.health.isprintable():
        raise InputError("the health command is too long or not printable", "put the command into a script")
    if config.health == "onnxruntime" and not has_onnxruntime():
        raise Unsupported("onnxruntime is not installed", "install it, or use --health none to check digests only")


def _read_base(base: Path, sha256: str) -> Release:
    """The release in `base`, if its manifest is the one with digest `sha256` (empty: any)."""
    if sha256 and not DIGEST.fullmatch(sha256):
        raise InputError(f"{ascii(sha256)[:100]} is not a SHA-256", "use the 64 hex digits that sha256sum prints")
    release = Release.read(base)
    if sha256 and release.manifest_sha256 != sha256:
        raise CheckFailed(
            f"{base / MANIFEST} has SHA-256 {release.manifest_sha256}, expected {sha256}",
            "copy the expected base release again",
        )
    if release.manifest.updates:
        raise InputError(
            f"{base} is release {release.manifest.sequence} with {len(release.manifest.updates)} updates, expected the base",
            "use the base release, 00-base",
        )
    return release


def _fill(device: Store, release: Release, keys: set[PublicKey]) -> None:
    for name in ("slots", "factors", "trust"):
        make_folder(device.path / name)
    _copy(release, device.path / BASE)
    for key in keys:
        write_file(device.path / "trust" / f"{key.keyid}.pub", key.to_pem().encode())
    write_config(device.path / CONFIG, device.config)
    device.switch(BASE)
    device.write_state(State())


def _copy(release: Release, to: Path) -> None:
    """Copy a release read-only and synced, so that an existing store is complete even after a power cut."""
    digests = {path: file.sha256 for path, file in release.manifest.files.items()}
    for path, sha256 in {**digests, MANIFEST: release.manifest_sha256}.items():
        target = inside(to, path)
        make_folder(target.parent)
        write_file(target, _chunks(inside(release.path, path), sha256), 0o444)
    for folder in to.rglob("*"):
        if folder.is_dir():
            sync_folder(folder)


def _chunks(path: Path, sha256: str) -> Iterator[bytes]:
    """A file's bytes, hashed while they are copied. Raises CheckFailed at the end on a digest mismatch."""
    digest = hashlib.sha256()
    try:
        for chunk in read_chunks(path):
            digest.update(chunk)
            yield chunk
    except FileNotFoundError:
        raise CheckFailed(f"{path} is missing", "copy it from the release it belongs to") from None
    if digest.hexdigest() != sha256:
        raise CheckFailed(
            f"{path} is damaged: SHA-256 {digest.hexdigest()}, expected {sha256}",
            "copy it from the release it belongs to",
        )


def _check_health(device: Store, run: Run) -> None:
    if device.config.health != "onnxruntime":
        return
    with device.lock(0) as descriptor:
        try:
            run(device, descriptor, "health", BASE)
        except R1ExportError as error:
            raise type(error)(f"the base release fails the health check: {error.message}", error.remedy) from error
