"""Write a release: one self-contained folder, written atomically.

The .onnx files are copied from the export of the base; only the weights and the files that depend on them are new.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from r1export.errors import refused
from r1export.export.int8 import SCALE
from r1export.export.model_card import model_card
from r1export.export.tokenizer import write_tokenizer
from r1export.export.weight_map import Placement, WeightMap
from r1export.update.atomic_io import new_folder, sha256_bytes, sha256_file, write_file, write_json
from r1export.update.container import write_tensors
from r1export.update.factors import Rows
from r1export.update.golden_samples import GoldenSamples
from r1export.update.manifest import PROCEDURES
from r1export.update.release_layout import (
    CLASS_EMBEDS,
    CLASSES,
    GOLDEN,
    GRAPHS,
    MODEL_CARD,
    MODEL_CONFIG,
    PREPROCESS,
    PREPROCESS_GRAPH,
    STATIC_GRAPHS,
    TOKENIZER,
    UNLISTED,
    class_embeddings_file,
    class_names_file,
)
from r1export.update.release_manifest import (
    BaseModel,
    FileEntry,
    GoldenGate,
    MergedUpdate,
    ReleaseManifest,
    TaskEntry,
    TensorEntry,
)
from r1export.update.run_layout import WEIGHT_MAP


@dataclass(frozen=True)
class TaskClasses:
    """Class embeddings (C, D) of one task, the names and templates they were made from, and whether the task was learned."""

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    embeddings: np.ndarray
    learned: bool


@dataclass(frozen=True)
class ReleaseContent:
    """Everything that makes one release. `accuracy` is asked for the folder once its graphs and weights are there.

    `adapted` are the rows that this or a later release adapts: the same for all, so that their maps are. `model_config` is
    what open_clip_config.json says.
    """

    name: str
    sequence: int
    precision: str
    base: BaseModel
    updates: tuple[MergedUpdate, ...]
    weights: Mapping[str, np.ndarray]
    tasks: tuple[TaskClasses, ...]
    golden: GoldenSamples
    preprocess: Mapping[str, Any]
    tokenizer: Any
    graph_digests: Mapping[str, str]
    accuracy: Callable[[Path], Mapping[str, float]]
    versions: Mapping[str, str]
    tolerance: GoldenGate
    adapted: tuple[Rows, ...] = ()
    model_config: Mapping[str, Any] = field(default_factory=dict)


def write_release(content: ReleaseContent, graphs: Path, path: Path) -> ReleaseManifest:
    """Write the release folder `path` and return its manifest. `graphs` is the folder of the one export.

    Raises:
        InputError: `path` cannot be.
        Unsupported: no space, no permission. Nothing half-written is left.
    """
    weights = WeightMap.read(graphs / WEIGHT_MAP)
    with refused_writes(path), new_folder(path) as folder:
        optional = (name for name in (PREPROCESS_GRAPH, *STATIC_GRAPHS) if (graphs / name).exists())
        for graph in (*GRAPHS, *optional):
            shutil.copyfile(graphs / graph, folder / graph)
        tensors = {file: weights.stored(file, content.weights) for file in weights.files}
        with ThreadPoolExecutor(1) as pool:  # all bytes are hashed twice, which takes as long as writing them
            entries = pool.submit(_tensor_entries, weights, tensors, content)
            for file, stored in tensors.items():
                write_tensors(folder / file, stored)
            _write_client_files(content, folder)
            accuracy = content.accuracy(folder)
            manifest = _with_golden(content, accuracy, entries.result(), folder).sealed()
        manifest.write(folder)
        write_file(folder / MODEL_CARD, model_card(manifest).encode())
    return manifest


def _write_client_files(content: ReleaseContent, folder: Path) -> None:
    """What clients read next to the graphs."""
    _write_classes(content.tasks, folder)
    write_json(folder / PREPROCESS, content.preprocess)
    write_json(folder / MODEL_CONFIG, content.model_config)
    write_tokenizer(content.tokenizer, folder / TOKENIZER)


def _with_golden(
    content: ReleaseContent, accuracy: Mapping[str, float], tensors: Mapping[str, TensorEntry], folder: Path
) -> ReleaseManifest:
    """Write the golden samples, which name the embedding space that the files before them make; the manifest of it all."""
    files = _file_entries(folder)
    manifest = _manifest(content, accuracy, files, tensors)
    manifest = replace(manifest, embedding_space=manifest.space())
    golden = replace(content.golden, embedding_space=manifest.embedding_space)
    write_tensors(folder / GOLDEN, golden.tensors())
    entry = FileEntry(sha256_file(folder / GOLDEN), (folder / GOLDEN).stat().st_size)
    return replace(manifest, files=dict(sorted({**files, GOLDEN: entry}.items())))


@contextmanager
def refused_writes(path: Path) -> Iterator[None]:
    """Turns an OSError while writing under `path` into one line that names the place and the remedy."""
    try:
        yield
    except OSError as error:
        raise refused(error, f"cannot write {path}") from error


def _write_classes(tasks: tuple[TaskClasses, ...], folder: Path) -> None:
    (folder / CLASSES).mkdir()
    for task in tasks:
        write_tensors(folder / class_embeddings_file(task.name), {CLASS_EMBEDS: task.embeddings})
        write_json(
            folder / class_names_file(task.name),
            {
                "task": task.name,
                "classes": list(task.classes),
                "templates": list(task.templates),
                "learned": task.learned,
            },
        )


def _manifest(
    content: ReleaseContent,
    accuracy: Mapping[str, float],
    files: Mapping[str, FileEntry],
    tensors: Mapping[str, TensorEntry],
) -> ReleaseManifest:
    return ReleaseManifest(
        name=content.name,
        sequence=content.sequence,
        procedure=PROCEDURES[content.precision],
        precision=content.precision,
        base=content.base,
        updates=content.updates,
        tasks=tuple(TaskEntry(t.name, len(t.classes), t.learned, accuracy.get(t.name)) for t in content.tasks),
        graphs=content.graph_digests,
        golden=content.tolerance,
        files=files,
        tensors=tensors,
        versions=content.versions,
    )


def _file_entries(folder: Path) -> dict[str, FileEntry]:
    listed = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in UNLISTED)
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(sha256_file, listed))
    return {
        path.relative_to(folder).as_posix(): FileEntry(digest, path.stat().st_size)
        for path, digest in zip(listed, digests, strict=True)
    }


def _tensor_entries(
    weights: WeightMap, tensors: Mapping[str, Mapping[str, np.ndarray]], content: ReleaseContent
) -> dict[str, TensorEntry]:
    """Parameter -> where its bytes lie, in which form, and their digest; `tensors` are those of each file, as stored."""
    entries = {}
    for file, placements in weights.files.items():
        specs = weights.layout(file).by_name
        for placement in placements:
            name = placement.parameter
            entries[name] = TensorEntry(
                file=file,
                offset=specs[name].offset,
                dtype=specs[name].dtype,
                shape=specs[name].shape,
                rows=rows_of(name, content.weights[name].shape, content.adapted),
                transposed=placement.transposed,
                sha256=sha256_bytes(tensors[file][name]),
                scale=name + SCALE if placement.dtype == "I8" else "",
                model_shape=_model_shape(placement, content.weights[name].shape),
            )
    return entries


def _model_shape(placement: Placement, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of a parameter in the model where it does not follow from how it is stored."""
    stored = placement.shape[::-1] if placement.transposed else placement.shape
    return None if stored == shape else shape


def rows_of(parameter: str, shape: Sequence[int], adapted: Iterable[Rows]) -> tuple[tuple[int, int], ...]:
    """(start, stop) of each adapted linear in a parameter (rows, in), a packed one has several; else all rows, none of a scalar.

    `shape` is that in the model, not as it is stored, which may be transposed or have further axes.
    """
    found = sorted((rows.start, rows.stop) for rows in adapted if rows.parameter == parameter)
    return tuple(found) or tuple((0, height) for height in shape[:1])
