"""Client layouts that follow the current version: each version has its own in layouts/NAME, and `current` switches them with it.

`init` replaces a folder that `r1export layout` made of the base release with a link to STORE/current/layouts/NAME. A client
that opens the folder gets one version or the other, and a rollback also restores the folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from r1export.device.store import BASE, BUNDLE, Store
from r1export.errors import CheckFailed, InputError
from r1export.update.atomic_io import (
    inside,
    json_bytes,
    make_folder,
    read_chunks,
    read_regular,
    remove,
    sha256_bytes,
    sha256_file,
    sync_folder,
    write_file,
)
from r1export.update.bundle import Bundle
from r1export.update.container import parse_tensors
from r1export.update.golden_samples import GoldenSamples
from r1export.update.layout_file import LayoutFile, Origin
from r1export.update.linking import link_or_copy
from r1export.update.oci import EMPTY, EMPTY_TYPE, IMAGE, INDEX, UPDATE_TYPE, Descriptor, blob
from r1export.update.open_clip_weights import write_open_clip_weights
from r1export.update.release_layout import GOLDEN
from r1export.update.release_manifest import check_file

LAYOUTS = "layouts"
OCI, OPEN_CLIP = "oci", "openclip"  # the layouts that need more than links
MAX_INDEX = 1 << 20  # bytes of an OCI index
AGAIN = "recreate the layout: r1export layout BASE FOLDER --to NAME --no-variants"


@dataclass(frozen=True)
class Taken:
    """A layout for a new store: its path and its layout.json."""

    path: Path
    layout: LayoutFile


def take(paths: Sequence[Path], base_manifest: str, mode: str) -> list[Taken]:
    """Read and check the layouts for `init`; `base_manifest` is the digest of the base's manifest.json.

    Raises:
        InputError: not a layout, a layout of another release or with variants, two of a kind, or a mode without files.
        CheckFailed: a generated file is corrupted.
    """
    found = [Taken(path, LayoutFile.read(path)) for path in paths]
    if found and mode != "slot":
        raise InputError(f"--layout needs files, which mode {mode} does not store", "use --mode slot")
    kinds = [taken.layout.layout for taken in found]
    for path, layout in [(taken.path, taken.layout) for taken in found]:
        if path.is_symlink() or kinds.count(layout.layout) > 1:
            raise InputError(f"{path} is a link, or the second {layout.layout} layout", "pass one folder of each kind")
        if layout.origin.sha256 != base_manifest or layout.variants:
            what = "with variants" if layout.variants else f"of release {layout.origin.name}"
            raise InputError(f"{path} is a layout {what}, expected a layout of the base without variants", AGAIN)
        for name, sha256 in layout.made.items():
            check_file(inside(path, name), sha256)
    return found


def add(device: Store, taken: Sequence[Taken]) -> None:
    """Give the base version of a new store its layouts."""
    for one in taken:
        folder = _of_base(device) / one.layout.layout
        for path in one.layout.made:
            _write(folder / path, b"".join(read_chunks(inside(one.path, path))))
        _link(one.layout.files, device.folder(BASE), folder)
        layout = replace(one.layout, converted=_convert(device, one.layout, device.folder(BASE), folder))
        layout.write(folder)
    _sync(_of_base(device))


def hand_over(store: Path, taken: Sequence[Taken]) -> None:
    """Replace each folder with a link to the current version's layout. The folder is missing for a moment."""
    for one in taken:
        target = store / "current" / LAYOUTS / one.layout.layout
        hidden, old = (one.path.with_name(f".{one.path.name}.{end}.partial") for end in ("new", "old"))
        remove(hidden)
        hidden.symlink_to(os.path.relpath(target, one.path.resolve().parent))
        one.path.rename(old)
        hidden.rename(one.path)
        sync_folder(one.path.parent)
        remove(old)


def derive(device: Store, offer: Bundle, folder: Path) -> None:
    """Write the layouts of the version whose files lie in `folder`. Raises OSError, InputError."""
    for base in _base_layouts(device):
        target = folder / LAYOUTS / base.name
        _refresh(device, offer, base, folder, target)
        _sync(target)


def check(device: Store, slot: str) -> None:
    """Check every layout of a version. Raises InputError, CheckFailed."""
    for base in _base_layouts(device):
        version = device.folder(slot)
        folder = version / LAYOUTS / base.name
        layout = LayoutFile.read(folder)
        source = device.folder(BASE) if layout.layout == OCI else version
        for path, sha256 in {**layout.made, **layout.converted}.items():
            check_file(inside(folder, path), sha256)
        for path, name in layout.files.items():
            if not _same(inside(folder, path), inside(source, name)):
                raise CheckFailed(f"{folder / path} differs from {name} of its version", "apply the update again")


def repair(device: Store, slot: str, derived: Path) -> None:
    """Repair the layouts of a version in use, file by file; `derived` is a fresh build of the same version."""
    version = device.folder(slot)
    for base in _base_layouts(device):
        fresh, folder = derived / LAYOUTS / base.name, version / LAYOUTS / base.name
        layout = LayoutFile.read(fresh)
        for path in (*layout.paths, "layout.json"):
            target = inside(folder, path)
            source = version / layout.files[path] if path in layout.files and layout.layout != OCI else fresh / path
            if not _same(target, source):
                make_folder(target.parent)
                hidden = target.with_name(f".{target.name}.partial")
                remove(hidden)
                link_or_copy(source, hidden)
                os.replace(hidden, target)
        _sync(folder)


def extra_bytes(device: Store) -> int:
    """The bytes that the layouts of one more version need in addition to links."""
    total = 0
    for base in _base_layouts(device):
        layout = LayoutFile.read(base)
        total += sum((base / path).stat().st_size for path in layout.converted)
    return total


def _of_base(device: Store) -> Path:
    return device.folder(BASE) / LAYOUTS


def _base_layouts(device: Store) -> Iterator[Path]:
    folder = _of_base(device)
    return iter(sorted(folder.iterdir()) if folder.is_dir() else [])


def _refresh(device: Store, offer: Bundle, base: Path, version: Path, target: Path) -> None:
    layout = LayoutFile.read(base)
    origin = Origin("update", offer.manifest.name, offer.digest)
    for path, sha256 in layout.made.items():
        check_file(inside(base, path), sha256)  # a corrupted file must not be copied
        if not (layout.layout == OCI and path == INDEX):
            link_or_copy(inside(base, path), inside(target, path))
    if layout.layout == OCI:  # published blobs stay; the update refers to them
        _link(layout.files, device.folder(BASE), target)
        replace(layout, origin=origin, made=_add_referrer(layout, offer, base, version, target)).write(target)
        return
    _link(layout.files, version, target)
    converted = _convert(device, layout, version, target)
    golden = parse_tensors(b"".join(read_chunks(version / GOLDEN)), Path(GOLDEN))
    space = GoldenSamples.from_tensors(golden).embedding_space
    replace(layout, origin=origin, converted=converted, embedding_space=space).write(target)


def _link(files: Mapping[str, str], source: Path, target: Path) -> None:
    for path, name in files.items():
        link_or_copy(inside(source, name), inside(target, path))


def _convert(device: Store, layout: LayoutFile, version: Path, target: Path) -> Mapping[str, str]:
    """Write the converted files; path -> SHA-256. Raises InputError for a layout that this updater can't convert."""
    if layout.converted and layout.layout != OPEN_CLIP:
        raise InputError(
            f"layout {layout.layout} needs a conversion that this updater doesn't support", "update the updater first"
        )
    for path in layout.converted:
        make_folder(inside(target, path).parent)
        write_open_clip_weights(version, device.base().manifest, target / path)
    return {path: sha256_file(target / path) for path in layout.converted}


def _add_referrer(layout: LayoutFile, offer: Bundle, base: Path, version: Path, target: Path) -> Mapping[str, str]:
    """Add the update to an OCI layout as a manifest that refers to the base's; returns the digests of the new blobs."""
    index = json.loads(read_regular(base / INDEX, MAX_INDEX))
    subject = {name: index["manifests"][0][name] for name in ("mediaType", "digest", "size")}
    data = offer.to_bytes()
    layer = Descriptor(UPDATE_TYPE, sha256_bytes(data), len(data), {"org.opencontainers.image.title": BUNDLE})
    manifest = json_bytes(
        {
            "schemaVersion": 2,
            "mediaType": IMAGE,
            "artifactType": UPDATE_TYPE,
            "config": Descriptor(EMPTY_TYPE, sha256_bytes(EMPTY), len(EMPTY)).to_json(),
            "layers": [layer.to_json()],
            "subject": subject,
        }
    )
    listed = Descriptor(IMAGE, sha256_bytes(manifest), len(manifest), artifact_type=UPDATE_TYPE)
    index["manifests"].append(listed.to_json())
    added = {blob(sha256_bytes(content)): content for content in (data, manifest, EMPTY)}
    added[INDEX] = json_bytes(index)
    for path, content in added.items():
        _write(target / path, content)
    return {**layout.made, **{path: sha256_bytes(content) for path, content in added.items()}}


def _write(path: Path, data: bytes) -> None:
    make_folder(path.parent)
    write_file(path, data)


def _same(path: Path, other: Path) -> bool:
    """Whether both are the same file, or have the same bytes."""
    if path.is_symlink() or not path.is_file():
        return False
    return os.path.samefile(path, other) or sha256_file(path) == sha256_file(other)


def _sync(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            sync_folder(path)
    sync_folder(folder.parent)
