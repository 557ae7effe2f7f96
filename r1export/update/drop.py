"""A version without one task: the same release, derived from the base again with that task's experts left out.

Nothing is subtracted, so the result is what training would have written had the task's experts not been selected.
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

import numpy as np

from r1export.errors import InputError, Unsupported
from r1export.update.container import read_tensors, write_tensors
from r1export.update.factors import ExpertUpdate
from r1export.update.files import sha256_file, write_file, write_json
from r1export.update.rebuild import Rebuild
from r1export.update.release import MANIFEST, Release, sealed

GOLDEN = "golden.safetensors"
TOWERS = (("visual.onnx", "pixel_values", "image_embeds"), ("textual.onnx", "input_ids", "text_embeds"))
Refresh = Callable[
    [Path], None
]  # rewrites in a release folder what follows from its weights: class embeddings, golden outputs


@contextmanager
def release_without(
    base: Release,
    target: Release,
    factors: Mapping[str, ExpertUpdate],
    dropped: Sequence[str],
    refresh: Refresh | None = None,
) -> Iterator[Release]:
    """`target` without the tasks `dropped`, as a release folder that lives as long as the block.

    `refresh` is called with the folder once its weights are there; by default golden outputs are computed with onnxruntime
    and class embeddings are kept, which is right only where the text tower does not change.

    Raises:
        InputError: no such task, or class embeddings would have to be computed anew.
        Unsupported: onnxruntime is not installed.
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
        (refresh or _refresh_golden)(folder)
        if (
            refresh is None
            and _text_changed(target, folder)
            and any(path.startswith("classes/") for path in target.files.keys() - gone)
        ):
            raise InputError(
                "the text tower changes, so class embeddings have to be computed anew",
                "pass `refresh`, or drop at the next training run",
            )
        _write_manifest(folder, target, rebuild, before, kept, dropped)
        yield Release.read(folder)


def _refresh_golden(folder: Path) -> None:
    """Compute the golden outputs of the towers in `folder` with onnxruntime's CPU provider."""
    try:
        import onnxruntime
    except ImportError:
        raise Unsupported("onnxruntime is not installed", "pip install onnxruntime") from None
    golden = read_tensors(folder / GOLDEN)
    for graph, given, answer in TOWERS:
        if given in golden and (folder / graph).is_file():
            session = onnxruntime.InferenceSession(folder / graph, providers=["CPUExecutionProvider"])
            (golden[answer],) = session.run([answer], {session.get_inputs()[0].name: golden[given]})
    write_tensors(folder / GOLDEN, golden)


def _text_changed(target: Release, folder: Path) -> bool:
    one, other = read_tensors(target.path / GOLDEN), read_tensors(folder / GOLDEN)
    return "text_embeds" in one and not np.array_equal(one["text_embeds"], other["text_embeds"])


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
