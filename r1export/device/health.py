"""Does a version answer as it did in the lab? Golden inputs through onnxruntime, against the outputs that were signed.

Hashes prove that the bytes are right; this proves that the machine computes with them as it should.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from r1export.device.version import Version
from r1export.errors import CheckFailed
from r1export.update.container import read_tensors
from r1export.update.manifest import Health

TOWERS = (("visual.onnx", "pixel_values", "image_embeds"), ("textual.onnx", "input_ids", "text_embeds"))


@dataclass(frozen=True)
class Agreement:
    """How far a tower's embeddings (n, D) are from the expected ones."""

    tower: str
    samples: int
    max_abs: float
    min_cosine: float
    top1: float


def check_health(version: Version, limits: Health) -> list[Agreement]:
    """Run the golden inputs of every tower that the version has.

    Raises:
        CheckFailed: an answer is further off than `limits`, the version has no golden inputs at all, or none of a tower
            that its updates change.
        Unsupported: onnxruntime is not installed.
    """
    golden = _tensors(version, "golden.safetensors")
    found = []
    for graph, given, answer in TOWERS:
        if graph not in version.paths:
            continue
        if len(golden.get(given, ())) and answer in golden:
            session = version.session(graph)
            (embeds,) = session.run([answer], {session.get_inputs()[0].name: golden[given]})
            found.append(compare(graph, embeds, golden[answer], _class_embeds(version)))
        elif version.merged_weights(graph):
            raise CheckFailed(
                f"version {version.name} changes {graph}, but has no golden inputs for it", "export the release again"
            )
    if not found:
        raise CheckFailed(f"version {version.name} has no golden inputs", "export the release again")
    for result in found:
        _judge(result, limits)
    return found


def compare(tower: str, embeds: np.ndarray, expected: np.ndarray, classes: list[np.ndarray]) -> Agreement:
    """Differences of embeddings (n, D), and the share of equal nearest classes over all lists of class embeddings (C, D)."""
    one, other = embeds.astype(np.float64), expected.astype(np.float64)
    if one.shape != other.shape or not np.isfinite(one).all():
        raise CheckFailed(
            f"{tower}: embeddings {one.shape}, or not finite; expected {other.shape}", "the old version stays active"
        )
    cosine = (one * other).sum(1) / np.maximum(np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1), 1e-30)
    lists = [embeds_CD for embeds_CD in classes if embeds_CD.shape[1:] == one.shape[1:]]
    same = [np.mean((one @ c.T).argmax(1) == (other @ c.T).argmax(1)) for c in lists] or [1.0]
    return Agreement(tower, len(one), float(np.abs(one - other).max()), float(cosine.min()), float(min(same)))


def _judge(found: Agreement, limits: Health) -> None:
    for name, value, limit, holds in (
        ("largest difference", found.max_abs, limits.max_abs, found.max_abs <= limits.max_abs),
        ("smallest cosine", found.min_cosine, limits.min_cosine, found.min_cosine >= limits.min_cosine),
        ("equal top-1", found.top1, limits.min_agreement, found.top1 >= limits.min_agreement),
    ):
        if not holds:
            raise CheckFailed(
                f"health check of {found.tower}: {name} {value:.9g}, limit {limit:.9g}", "the old version stays active"
            )


def _class_embeds(version: Version) -> list[np.ndarray]:
    lists = []
    for path in version.paths:
        if path.startswith("classes/") and path.endswith(".safetensors"):
            lists += [tensor.astype(np.float64) for tensor in _tensors(version, path).values() if tensor.ndim == 2]
    return lists


def _tensors(version: Version, path: str) -> dict[str, np.ndarray]:
    if version.files_there:
        return read_tensors(version.folder / path)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tensors.safetensors"
        file.write_bytes(version.read(path))
        return read_tensors(file)
