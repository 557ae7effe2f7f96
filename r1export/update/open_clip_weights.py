"""The weights of a release as open_clip names and shapes them, in one safetensors file; a device can write it too."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np

from r1export.errors import Unsupported
from r1export.update.container import TensorSpec, plan, write_layout
from r1export.update.rebuild import read_stored
from r1export.update.release_manifest import ReleaseManifest, TensorEntry


def write_open_clip_weights(folder: Path, manifest: ReleaseManifest, out: Path) -> None:
    """Write all parameters of the weights files in `folder`, which lie as `manifest` says, to `out`.

    Raises:
        Unsupported: a shape in the model does not fit what is stored.
        InputError: a weights file is shorter than the manifest says.   OSError: no space.
    """
    entries = manifest.tensors
    layout = plan((name, entries[name].dtype, _shape(name, entries[name])) for name in sorted(entries))
    write_layout(out, layout, lambda spec: _parameter(folder, entries[spec.name], spec))


def _shape(name: str, entry: TensorEntry) -> tuple[int, ...]:
    shape = entry.model_shape if entry.model_shape is not None else entry.shape
    if entry.model_shape is None and entry.transposed:
        shape = entry.shape[::-1]
    if prod(shape) != prod(entry.shape):
        raise Unsupported(f"{name} has shape {shape} in the model, {entry.shape} stored", "export the release again")
    return shape


def _parameter(folder: Path, entry: TensorEntry, spec: TensorSpec) -> np.ndarray:
    stored = read_stored(folder, entry)
    if entry.transposed:  # a matrix, perhaps stored with further axes
        rows, columns = spec.shape
        return np.ascontiguousarray(stored.reshape(columns, rows).T)
    return stored.reshape(spec.shape)
