"""The files of an installed version: derive them from an update, check them, replace what is damaged."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Callable

from r1export.device import layouts
from r1export.device.store import BASE, BUNDLE, Store, retire, write_new
from r1export.errors import CheckFailed, InputError, R1ExportError
from r1export.update.atomic_io import (
    inside,
    make_folder,
    read_chunks,
    remove,
    sha256_bytes,
    sha256_file,
    sync_folder,
    write_file,
)
from r1export.update.bundle import Bundle, read_bundle
from r1export.update.release_manifest import check_file

Step = Callable[[str, str], None]  # (verb, name of the folder in slots/): `worker.run` in one store


def check_slot(device: Store, slot: str) -> None:
    """Verify an installed version with the current keys, and hash all of its files.

    Raises:
        InputError, CheckFailed: corrupted, or signed with keys that are no longer trusted.
    """
    if slot == BASE:
        device.base().check()
        return layouts.check(device, BASE)
    bundle = Bundle.parse(read_bundle(device.folder(slot) / BUNDLE), device.trusted(), device.config.threshold)
    if bundle.slot != slot:
        raise CheckFailed(f"{device.folder(slot)} contains version {bundle.slot}", "apply the update again")
    return _check_contents(device, bundle)


def is_whole(device: Store, offer: Bundle) -> bool:
    """Whether the version of `offer` is installed and intact, whatever signatures its stored update has."""
    try:
        _check_contents(device, offer)
    except (R1ExportError, OSError):
        return False
    return True


def _check_contents(device: Store, bundle: Bundle) -> None:
    """Hash all files of the version of `bundle`. Raises InputError or CheckFailed if it is corrupted or missing."""
    folder = device.folder(bundle.slot)
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist", "apply the update again")
    device.update(bundle)
    for path, sha256 in _files(device, bundle).items():
        check_file(inside(folder, path), sha256)
    layouts.check(device, bundle.slot)


def _files(device: Store, bundle: Bundle) -> dict[str, str]:
    """The files in the version's folder except the update, with their SHA-256."""
    return {file.path: file.sha256 for file in bundle.manifest.files} if device.config.mode == "slot" else {}


def is_rotten(device: Store, offer: Bundle) -> bool:
    """Whether the base or the factors that the update builds on are corrupted, which is not the update's fault."""
    try:
        device.base().check()
        for update in offer.manifest.updates:
            if not update.experts:
                check_file(device.factors_path(update.sha256), update.sha256)
    except (R1ExportError, OSError):
        return True
    return False


def build(device: Store, offer: Bundle, run: Step) -> None:
    """Build the version under a hidden name, then rename it; a corrupted slot of the same name is removed."""
    folder = device.folder(offer.slot)
    if folder.exists():
        retire(folder)
    _derive(device, offer, run).rename(folder)


def _derive(device: Store, offer: Bundle, run: Step) -> Path:
    """Write the files of the version to a hidden folder, hash and sync them. Returns the folder."""
    partial = device.folder(f".{offer.slot}.partial")
    make_folder(partial)
    write_new(partial / BUNDLE, [offer.to_bytes()])
    run("build", partial.name)
    for path, sha256 in _files(device, offer).items():
        if (digest := sha256_file(inside(partial, path))) != sha256:
            raise CheckFailed(
                f"{path} has SHA-256 {digest}, expected {sha256} as signed", "build the update again for this base"
            )
    layouts.derive(device, offer, partial)
    _sync_tree(partial)
    return partial


def replace_damaged(device: Store, offer: Bundle, run: Step) -> None:
    """Rebuild the current version and replace the files that differ, one by one.

    A concurrent reader, or a restart after a power cut, finds either the old or the repaired file.
    """
    partial, folder = _derive(device, offer, run), device.folder(offer.slot)
    if not folder.is_dir():
        remove(folder)
        partial.rename(folder)
        return
    for path, sha256 in _files(device, offer).items():
        _clear(folder, path)
        if not _has_digest(folder / path, sha256):
            write_file(folder / path, read_chunks(partial / path))
    layouts.repair(device, offer.slot, partial)
    _sync_tree(folder)
    remove(partial)


def store_bundle(device: Store, offer: Bundle) -> bool:
    """Store `offer` with its current signatures as the update of its version. Returns whether that changed anything."""
    folder, data = device.folder(offer.slot), offer.to_bytes()
    if _has_digest(folder / BUNDLE, sha256_bytes(data)):
        return False
    _clear(folder, BUNDLE)
    write_file(folder / BUNDLE, data)
    return True


def write_factors(device: Store, offer: Bundle, added: list[Path]) -> None:
    make_folder(device.path / "factors")
    for sha256, update in offer.carried.items():
        path = device.factors_path(sha256)
        if _has_digest(path, sha256):
            continue
        partial = path.with_name(f".{path.name}.partial")
        write_new(partial, [update.to_bytes()])
        added.append(path)
        partial.rename(path)
    sync_folder(device.path / "factors")  # also if nothing changed: an updater may have died before the sync


def _clear(folder: Path, path: str) -> None:
    """Make room for the file `path` in `folder`: remove links, and anything that blocks the path."""
    for parent in [folder / parent for parent in reversed(Path(path).parents[:-1])]:
        if parent.is_symlink() or not parent.is_dir():
            remove(parent)
        make_folder(parent)
    if not _is_regular(folder / path):
        remove(folder / path)


def _has_digest(path: Path, sha256: str) -> bool:
    try:
        return _is_regular(path) and sha256_file(path) == sha256
    except OSError:  # a bad sector counts as a difference
        return False


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _sync_tree(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            sync_folder(path)
