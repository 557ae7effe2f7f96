"""Write a layout to a temporary folder, and rename it once it is complete."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from r1export.errors import InputError, Unsupported, refused
from r1export.layout.content import LayoutContent, ReleaseSource
from r1export.layout.table import layout_named
from r1export.update.atomic_io import inside, make_folder, new_folder, sha256_bytes, sha256_file, write_file
from r1export.update.layout_file import LAYOUT, LayoutFile, Origin
from r1export.update.linking import link_or_copy
from r1export.update.open_clip_weights import write_open_clip_weights
from r1export.update.release_layout import GOLDEN
from r1export.update.release_manifest import Release, check_file

VARIANTS = ("fp16", "int8")


@dataclass(frozen=True)
class WrittenLayout:
    """`shared` files are one with the release's; `added` counts the bytes of all others, layout.json among them."""

    path: Path
    layout: LayoutFile
    shared: int
    added: int
    notes: tuple[str, ...]


def read_source(release: Path, *, variants: bool) -> ReleaseSource:
    """The release in the folder `release`, every file of it checked; with the `variants` that its run has of it.

    Raises InputError, CheckFailed: it is no release, or damaged.
    """
    found = _checked(release)
    if not variants or found.manifest.precision != "fp32":
        return ReleaseSource(found)
    folders = {name: release.parent.parent / "variants" / name / "releases" / release.name for name in VARIANTS}
    there = {name: _checked(folder) for name, folder in folders.items() if folder.is_dir()}
    for name, variant in there.items():
        if variant.manifest.updates != found.manifest.updates or variant.manifest.base != found.manifest.base:
            raise InputError(f"{folders[name]} is another version", "export the run again, or use --no-variants")
    return ReleaseSource(found, {name: ReleaseSource(variant) for name, variant in there.items()})


def layout_release(
    release: Path | str, layout: str, out: Path | str, *, name: str = "", variants: bool = True
) -> WrittenLayout:
    """Make `out` the folder in which a client opens `release`; weights are hard-linked where the disk allows it.

    `layout` is one of r1export.layout.table.LAYOUTS, for example "fastembed"; `name` is what the client calls the model,
    where it has a name for it. A layout that has room for the run's fp16 and int8 releases gets them unless `variants` is False.

    Raises:
        InputError: `release` is no release, no such layout, `out` exists, or `name` does not fit.
        CheckFailed: the release is damaged.
        Unsupported: the layout cannot carry this release; no space, no permission. Nothing half-written is left.
    """
    source = read_source(Path(release), variants=variants and layout_named(layout).takes_variants)
    return write_layout(source, layout, Path(out), name=name)


def write_layout(source: ReleaseSource, layout: str, out: Path, *, name: str = "") -> WrittenLayout:
    """Make the folder `out`; `name` is what the client calls the model, where it has a name for it.

    Raises:
        InputError: no such layout, `out` exists, or `name` does not fit.
        Unsupported: the layout cannot carry this release; no space, no permission. Nothing half-written is left.
    """
    kind = layout_named(layout)
    if out.exists() or out.is_symlink():
        raise InputError(f"{out} exists", "choose another folder, or remove it first")
    content = with_golden(kind.content(source, name))
    try:
        with new_folder(out) as folder:
            shared = _fill(folder, source, content)
            described = _described(layout, source, content, folder)
            described.write(folder)
        files = [path for path in out.rglob("*") if path.is_file()]
    except OSError as error:
        raise refused(error, f"cannot write {out}") from error
    linked = sum(path.stat().st_size for path in shared_files(out, described) if path.stat().st_nlink > 1)
    added = sum(path.stat().st_size for path in files) - (linked if shared else 0)
    return WrittenLayout(out, described, shared, added, content.notes)


def with_golden(content: LayoutContent) -> LayoutContent:
    """The same with the release's golden samples, by which the folder can be checked wherever it is."""
    return replace(content, files={**content.files, GOLDEN: GOLDEN})


def shared_files(folder: Path, layout: LayoutFile) -> list[Path]:
    """The files of a layout that are bytes of its release."""
    paths = [*layout.files, *(path for files in layout.variants.values() for path in files)]
    return [folder / path for path in paths]


def _described(layout: str, source: ReleaseSource, content: LayoutContent, folder: Path) -> LayoutFile:
    release = source.release
    return LayoutFile(
        layout=layout,
        origin=Origin("release", release.manifest.name, release.manifest_sha256),
        files=content.files,
        made={path: sha256_bytes(data) for path, data in content.made.items()},
        max_abs=release.manifest.golden.max_abs,
        converted={path: sha256_file(folder / path) for path in content.converted},
        variants=content.variants,
        embedding_space=release.manifest.embedding_space,
    )


def _fill(folder: Path, source: ReleaseSource, content: LayoutContent) -> int:
    """Write all files but layout.json; how many of them are one file with the release's."""
    shared = 0
    groups = [(source, content.files), *((source.variants[name], files) for name, files in content.variants.items())]
    for origin, files in groups:
        for path, name in files.items():
            shared += link_or_copy(inside(origin.release.path, name), inside(folder, path))
    for path, data in content.made.items():
        make_folder(inside(folder, path).parent)
        write_file(folder / path, data)
    for path in content.converted:
        make_folder(inside(folder, path).parent)
        write_open_clip_weights(source.release.path, source.release.manifest, folder / path)
    return shared


def _checked(release: Path) -> Release:
    found = Release.read(release)
    found.check()
    return found


def check_layout_files(folder: Path) -> LayoutFile:
    """layout.json of `folder`, once every file that was written for the client is as it was written, and every other one is there.

    Raises InputError, CheckFailed.
    """
    layout = LayoutFile.read(folder)
    for path, sha256 in {**layout.made, **layout.converted}.items():
        check_file(inside(folder, path), sha256)
    for path in layout.paths:
        if not inside(folder, path).is_file():
            raise Unsupported(f"{folder / path} is missing", f"recreate the layout; {LAYOUT} lists the file")
    return layout
