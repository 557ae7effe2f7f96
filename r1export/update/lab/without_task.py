"""A version without one task: the same release, derived from the base without that task's experts.

Nothing is subtracted. Without its last task, a release equals the previous one; without an earlier task it is a new model,
since the experts of later tasks were trained on top of it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from r1export.errors import InputError
from r1export.update.atomic_io import sha256_bytes, sha256_file, write_file
from r1export.update.container import read_tensors, write_tensors
from r1export.update.factors import ExpertUpdate
from r1export.update.golden_samples import GoldenSamples
from r1export.update.rebuild import Rebuild
from r1export.update.release_layout import GOLDEN, class_embeddings_file, class_names_file
from r1export.update.release_manifest import FileEntry, Release, ReleaseManifest, TaskEntry

# Rewrites in a release folder what follows from its weights: class embeddings, golden outputs.
Refresh = Callable[[Path], None]


@contextmanager
def release_without(
    base: Release,
    target: Release,
    factors: Mapping[str, ExpertUpdate],
    dropped: Sequence[str],
    refresh: Refresh,
) -> Iterator[Release]:
    """`target` without the tasks `dropped`, as a release folder that lives as long as the block.

    `refresh` is called with the folder once its weights are there. Raises InputError if there is no such task.
    """
    tasks = [update.task for update in target.manifest.updates]
    if unknown := set(dropped) - set(tasks):
        raise InputError(
            f"release {target.manifest.sequence} has no task {sorted(unknown)[0]}", f"it has {', '.join(tasks)}"
        )
    kept = tuple(update for update in target.manifest.updates if update.task not in dropped)
    before, after = (
        Rebuild(base, ExpertUpdate.stack(factors[update.sha256] for update in updates))
        for updates in (target.manifest.updates, kept)
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in target.manifest.files.keys() - _gone(base, dropped):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            if path in before.merged_files:
                write_file(folder / path, after.chunks(path))
            else:
                source = base if path in _unlearned(base, dropped) else target
                shutil.copyfile(source.path / path, folder / path)
        refresh(folder)
        changed = {parameter: _digest(after, parameter) for parameter in before.changed}
        manifest = replace(
            target.manifest,
            name=f"{target.manifest.name}-without-{'-'.join(dropped)}",
            updates=kept,
            tasks=tuple(_unmeasured(task, dropped) for task in target.manifest.tasks),
            files=_files(folder),
            tensors={
                name: replace(entry, sha256=changed.get(name, entry.sha256))
                for name, entry in target.manifest.tensors.items()
            },
        )
        _in_its_space(manifest, folder).sealed().write(folder)
        yield Release.read(folder)


def _in_its_space(manifest: ReleaseManifest, folder: Path) -> ReleaseManifest:
    """The manifest with the embedding space of the smaller release, which the golden samples name too; older manifests have none."""
    if manifest.embedding_space is None:
        return manifest
    space = manifest.space()
    samples = GoldenSamples.from_tensors(read_tensors(folder / GOLDEN))
    write_tensors(folder / GOLDEN, replace(samples, embedding_space=space).tensors())
    return replace(manifest, embedding_space=space, files=_files(folder))


def _unlearned(base: Release, dropped: Sequence[str]) -> set[str]:
    """Files that say of a dropped task that it was learned; the base has them from before."""
    return {class_names_file(task) for task in dropped} & base.manifest.files.keys()


def _gone(base: Release, dropped: Sequence[str]) -> set[str]:
    """Files of dropped tasks that the base does not have."""
    files = {name(task) for task in dropped for name in (class_embeddings_file, class_names_file)}
    return files - base.manifest.files.keys()


def _unmeasured(task: TaskEntry, dropped: Sequence[str]) -> TaskEntry:
    """A task of the smaller release: its accuracy was measured with other weights."""
    return replace(task, learned=task.learned and task.name not in dropped, accuracy=None)


def _files(folder: Path) -> dict[str, FileEntry]:
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {path: FileEntry(sha256_file(folder / path), (folder / path).stat().st_size) for path in paths}


def _digest(rebuild: Rebuild, parameter: str) -> str:
    """Of the parameter's stored bytes: merged, or the base's where no update is left that changes it."""
    if parameter in rebuild.changed:
        return sha256_bytes(rebuild.tensor(parameter).tobytes())
    return rebuild.base.manifest.tensors[parameter].sha256
