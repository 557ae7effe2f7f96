"""How a fault is planted: an edit of a run or of its last release, after which every digest is made to fit again.

That is how a faulty pipeline leaves it: what is written is wrong and well described.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from r1export.errors import R1ExportError
from r1export.export.model_card import model_card
from r1export.update.atomic_io import sha256_bytes, sha256_file
from r1export.update.container import NAMES, read_layout, read_tensors, write_tensors
from r1export.update.release_layout import GOLDEN, MANIFEST, MODEL_CARD, VISUAL, class_embeddings_file, class_names_file
from r1export.update.release_manifest import FileEntry, ReleaseManifest, manifest_digest
from r1export.verify.graph_digest import graph_digest

ALONE, BESIDE, RUN = "release alone", "next to its base", "run"
MODES = (ALONE, BESIDE, RUN)
TASKS = ("digits", "arrows")
ELSEWHERE = "nothing in the release is wrong"
INSIDE_RUN = {ALONE: ELSEWHERE, BESIDE: ELSEWHERE}
Document = dict[str, Any]


@dataclass(frozen=True)
class Site:
    """A run of two tasks that passes. Faults are planted in its last release, if the edit says nothing else."""

    run: Path

    @property
    def releases(self) -> list[Path]:
        return sorted((self.run / "releases").iterdir())

    @property
    def base(self) -> Path:
        return self.run / "releases" / "00-base"

    @property
    def release(self) -> Path:
        return self.run / "releases" / f"{len(TASKS):02d}-{TASKS[-1]}"


Plant = Callable[[Site], object]


@dataclass(frozen=True)
class Fault:
    """One fault. `unknowable` says for a mode why it cannot be found there; in all others it has to be.

    `sealed` is False for an edit that is made after the digests: of a file that the manifest does not list, or of itself.
    """

    kind: str
    name: str
    plant: Plant
    unknowable: Mapping[str, str] = field(default_factory=dict)
    sealed: bool = True

    def put(self, site: Site) -> None:
        """Plant it, and make the digests of every release fit."""
        for step in (self.plant, seal_all) if self.sealed else (seal_all, self.plant):
            step(site)


def alone(reason: str) -> dict[str, str]:
    """What no release can know by itself, but its neighbours or its run do."""
    return {ALONE: reason}


def only_run(reason: str) -> dict[str, str]:
    """What only a run can know."""
    return {ALONE: reason, BESIDE: reason}


def seal_all(site: Site) -> None:
    for release in site.releases:
        if (release / MANIFEST).is_file():
            seal(release)


def seal(release: Path) -> None:
    """Make the manifest's digests, and the model card, fit what is there: of the files, tensors and graphs that it lists."""
    document = json.loads((release / MANIFEST).read_bytes())
    there = [name for name in document["files"] if (release / name).is_file()]
    document["files"] = {name: _file_entry(release / name) for name in there}
    graphs = {name: digest for name, digest in document["graphs"].items() if name in there}
    document["graphs"] = {name: _digest(release / name, digest) for name, digest in graphs.items()}
    for file in {entry["file"] for entry in document["tensors"].values()}:
        _seal_tensors(release / file, document["tensors"])
    _write(release, document)


def _digest(graph: Path, old: str) -> str:
    """The digest of the program, or the old one of a file that is no graph any more."""
    try:
        return graph_digest(graph)
    except R1ExportError:
        return old


def _file_entry(path: Path) -> Document:
    return {"sha256": sha256_file(path), "bytes": path.stat().st_size}


def _seal_tensors(path: Path, entries: dict[str, Document]) -> None:
    values = read_tensors(path)
    specs = read_layout(path).by_name
    for name in [name for name, entry in entries.items() if entry["file"] == path.name]:
        if name not in specs:
            del entries[name]
            continue
        spec, value = specs[name], np.ascontiguousarray(values[name])
        entries[name] |= {"offset": spec.offset, "dtype": NAMES[spec.dtype], "bytes": value.nbytes}
        entries[name] |= {"shape": list(spec.shape), "sha256": sha256_bytes(value)}


def _write(release: Path, document: Document) -> None:
    document["sha256"] = manifest_digest(document)
    (release / MANIFEST).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    try:
        manifest = ReleaseManifest.read(release).sealed()
    except R1ExportError:  # no manifest that anybody reads: the card stays
        return
    if manifest.embedding_space:
        manifest = in_its_space(manifest, release).sealed()
    manifest.write(release)
    (release / MODEL_CARD).write_text(model_card(manifest), encoding="utf-8")


def in_manifest(change: Callable[[Document], object], every: bool = False) -> Plant:
    """Edit manifest.json, of every release if asked, and seal it again."""

    def plant(site: Site) -> None:
        for release in site.releases if every else [site.release]:
            document = json.loads((release / MANIFEST).read_bytes())
            change(document)
            _write(release, document)

    return plant


def in_json(name: str, change: Callable[[Any], object]) -> Plant:
    """Edit a JSON file of the release."""

    def plant(site: Site) -> None:
        edit_json(site.release / name, change)

    return plant


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def in_text(name: str, change: Callable[[str], str]) -> Plant:
    """Edit a text file of the release."""

    def plant(site: Site) -> None:
        path = site.release / name
        path.write_text(change(path.read_text("utf-8")), encoding="utf-8")

    return plant


def in_tensors(name: str, change: Callable[[dict[str, np.ndarray]], object]) -> Plant:
    """Edit a safetensors file of the release: `change` gets its tensors, which it may write to."""

    def plant(site: Site) -> None:
        tensors = {key: value.copy() for key, value in read_tensors(site.release / name).items()}
        change(tensors)
        write_tensors(site.release / name, tensors)

    return plant


def in_golden(change: Callable[[dict[str, np.ndarray]], object]) -> Plant:
    return in_tensors(GOLDEN, change)


def in_weight(parameter: str, change: Callable[[np.ndarray], np.ndarray], file: str = VISUAL.weights) -> Plant:
    """Replace one parameter by what `change` makes of it."""

    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors[parameter] = np.ascontiguousarray(change(tensors[parameter])).astype(tensors[parameter].dtype)

    return in_tensors(file, edit)


def in_graph(name: str, change: Callable[[onnx.GraphProto], object], every: bool = True) -> Plant:
    """Edit a graph as if it had been exported so: in all releases and in the folder of the one export. Or in the last alone."""

    def plant(site: Site) -> None:
        for folder in [*site.releases, site.run / "graphs"] if every else [site.release]:
            model = onnx.load(folder / name, load_external_data=False)
            change(model.graph)
            (folder / name).write_bytes(model.SerializeToString(deterministic=True))

    return plant


def in_run_json(name: str, change: Callable[[Any], object]) -> Plant:
    """Edit a JSON file of the run."""
    return lambda site: edit_json(site.run / name, change)


def unlink(*names: str) -> Plant:
    """Delete files of the release."""

    def plant(site: Site) -> None:
        for name in names:
            (site.release / name).unlink()

    return plant


def copy_from_base(name: str) -> Plant:
    """Put the base's file in the place of the release's."""
    return lambda site: shutil.copyfile(site.base / name, site.release / name)


def together(*plants: Plant) -> Plant:
    """Several edits that make one fault."""

    def plant(site: Site) -> None:
        for one in plants:
            one(site)

    return plant


def class_files(task: str) -> tuple[str, str]:
    return class_embeddings_file(task), class_names_file(task)


def in_its_space(manifest: ReleaseManifest, release: Path) -> ReleaseManifest:
    """With the embedding space of what is there now, in the golden samples too; what else was done to these stays."""
    space = manifest.space()
    if space is None:
        return replace(manifest, embedding_space=None)
    with suppress(R1ExportError):
        tensors = read_tensors(release / GOLDEN)
        if "embedding_space" in tensors:
            text = np.frombuffer(json.dumps(space.to_json(), ensure_ascii=False).encode(), np.uint8)
            write_tensors(release / GOLDEN, tensors | {"embedding_space": text})
    path = release / GOLDEN
    entry = {GOLDEN: FileEntry(sha256_file(path), path.stat().st_size)} if GOLDEN in manifest.files else {}
    return replace(manifest, embedding_space=space, files={**manifest.files, **entry})
