"""Make a device's store: a base release as its first version, and the keys that it will trust."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from r1export.device.state import CONFIG, MODES, Config, State, write_config
from r1export.device.store import BASE, Store
from r1export.device.worker import has_onnxruntime, health_command
from r1export.errors import InputError, Unsupported
from r1export.update.atomic_io import new_folder, read_chunks, sync_folder, write_file
from r1export.update.envelope import PublicKey
from r1export.update.release_layout import MANIFEST
from r1export.update.release_manifest import Release


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
) -> Store:
    """Make a store from a base release and public keys; the base is its first version.

    Raises:
        InputError: the store exists, the release is no base, or an argument does not fit.
        CheckFailed: a file of the release is damaged.
        Unsupported: onnxruntime is missing while `health` asks for it.
    """
    if store.exists():
        raise InputError(f"{store} exists", "choose another folder; a store is changed by `apply` and `rollback` only")
    keys = [PublicKey.read(path) for path in trust]
    if mode not in MODES or keep < 1 or not 1 <= threshold <= len(set(keys)):
        raise InputError(
            f"mode {mode}, {threshold} of {len(set(keys))} keys, keep {keep}",
            f"mode is {' or '.join(MODES)}; need 1 <= threshold <= keys, keep >= 1",
        )
    health_command(health)
    if health == "onnxruntime" and not has_onnxruntime():
        raise Unsupported("onnxruntime is not installed", "install it, or say --health none to rely on hashes alone")
    release = Release.read(base)
    if release.manifest.updates:
        raise InputError(
            f"{base} is release {release.manifest.sequence} with {len(release.manifest.updates)} updates",
            "give the base release, 00-base",
        )
    release.check()
    config = Config(product, device_class, mode, health, threshold, keep, release.manifest_sha256)
    with new_folder(store) as folder:
        for name in ("slots", "factors", "trust"):
            (folder / name).mkdir()
        _copy(release, folder / BASE)
        for key in set(keys):
            write_file(folder / "trust" / f"{key.keyid}.pub", key.to_pem().encode())
        write_config(folder / CONFIG, config)
        Store(folder, config).switch(BASE)
        Store(folder, config).write_state(State())
    return Store(store, config)


def _copy(release: Release, to: Path) -> None:
    """Copy a release, read-only and for good: a store that is there is whole, after a power cut too."""
    for path in [*release.manifest.files, MANIFEST]:
        (to / path).parent.mkdir(parents=True, exist_ok=True)
        write_file(to / path, read_chunks(release.path / path))
        (to / path).chmod(0o444)
    for folder in to.rglob("*"):
        if folder.is_dir():
            sync_folder(folder)
