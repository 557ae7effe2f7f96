"""Manifests as values, for tests that need no whole release."""

from __future__ import annotations

from pathlib import Path

from r1export.update.atomic_io import sha256_bytes, sha256_file
from r1export.update.container import read_layout, read_tensors
from r1export.update.release_manifest import BaseModel, FileEntry, GoldenGate, ReleaseManifest, TensorEntry


def manifest_of(release: Path, files: tuple[str, ...] = (), weights: tuple[str, ...] = (), **fields) -> ReleaseManifest:
    """The sealed manifest of a folder that lists `files` and the tensors of `weights` as they are now."""
    entries = {name: FileEntry(sha256_file(release / name), (release / name).stat().st_size) for name in files}
    tensors = {
        spec.name: TensorEntry(
            file, spec.offset, spec.dtype, spec.shape, ((0, spec.shape[0]),), False, sha256_bytes(values[spec.name])
        )
        for file in weights
        for values in [read_tensors(release / file)]
        for spec in read_layout(release / file).specs
    }
    defaults = {
        "name": "01-digits", "sequence": 1, "procedure": "r1-f64-v1", "precision": "fp32", "base": BaseModel("tiny", "0" * 64, None),
        "updates": (), "tasks": (), "graphs": {}, "golden": GoldenGate(5e-5, 1 - 1e-6), "files": entries, "tensors": tensors, "versions": {"r1export": "0.1.0"},
        "sha256": "",
    }  # fmt: skip
    return ReleaseManifest(**defaults | fields).sealed()
