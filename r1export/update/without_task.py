"""A version without one task: the same release, derived from the base again with that task's experts left out.

Nothing is subtracted. Without its last task, a release is what training would have written had it ended before; without an
earlier one it is not, since the experts of later tasks were trained on top of it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from r1export.errors import InputError
from r1export.update.atomic_io import sha256_file, write_file, write_json
from r1export.update.factors import ExpertUpdate
from r1export.update.rebuild import Rebuild
from r1export.update.release_manifest import MANIFEST, Release, sealed

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
    tasks = [task for task, _ in target.updates]
    if unknown := set(dropped) - set(tasks):
        raise InputError(f"release {target.sequence} has no task {sorted(unknown)[0]}", f"it has {', '.join(tasks)}")
    kept = [(task, digest) for task, digest in target.updates if task not in dropped]
    rebuild = Rebuild(base, ExpertUpdate.stack(factors[digest] for _, digest in kept))
    before = Rebuild(base, ExpertUpdate.stack(factors[digest] for _, digest in target.updates))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unlearned = {f"classes/{task}.json" for task in dropped} & base.files.keys()
        gone = {f"classes/{task}.{kind}" for task in dropped for kind in ("safetensors", "json")} - base.files.keys()
        for path in target.files.keys() - gone:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            if path in before.merged_files:
                write_file(folder / path, rebuild.chunks(path))
            else:
                shutil.copyfile((base if path in unlearned else target).path / path, folder / path)
        refresh(folder)
        _write_manifest(folder, target, rebuild, before, kept, dropped)
        yield Release.read(folder)


def _unmeasured(task: Mapping[str, Any], dropped: Sequence[str]) -> dict[str, Any]:
    """A task's entry in the smaller release: accuracies were measured with other weights."""
    return {**task, "learned": task["learned"] and task["name"] not in dropped, "accuracy": None}


def _write_manifest(
    folder: Path,
    target: Release,
    rebuild: Rebuild,
    before: Rebuild,
    kept: Sequence[tuple[str, str]],
    dropped: Sequence[str],
) -> None:
    document = json.loads((target.path / MANIFEST).read_bytes())
    document["name"] = f"{target.name}-without-{'-'.join(dropped)}"
    document["updates"] = [{"task": task, "sha256": digest} for task, digest in kept]
    document["tasks"] = [_unmeasured(task, dropped) for task in document["tasks"]]
    paths = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    document["files"] = {
        path: {"sha256": sha256_file(folder / path), "bytes": (folder / path).stat().st_size} for path in paths
    }
    for parameter in before.changed:
        merged = parameter in rebuild.changed
        digest = (
            hashlib.sha256(rebuild.tensor(parameter).tobytes()).hexdigest()
            if merged
            else rebuild.base.tensors[parameter].sha256
        )
        document["tensors"][parameter]["sha256"] = digest
    write_json(folder / MANIFEST, sealed(document))
