"""Parity: three errors, never one.

    merge    unmerged torch against merged torch      export   merged torch against ONNX
    total    unmerged torch against ONNX: what the user fields

"Unmerged" is the model with its experts beside the weights and a constant gate. Embeddings have unit norm. The error of
the base model's own export is the control that the gate is calibrated on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Encode = Callable[[np.ndarray], np.ndarray]
CONTROL_FACTOR = 4  # a merged model may err as much as this many times the base model's own export
FLIP_MARGIN = 1e-4  # a changed top-1 counts only if the reference preferred its class by more than this cosine
TOWERS = ("visual", "textual")


@dataclass(frozen=True)
class Model:
    """A CLIP as two functions: pixel_values (n, 3, H, W) -> (n, D) and input_ids (n, L) -> (n, D)."""

    visual: Encode
    textual: Encode

    def tower(self, name: str) -> Encode:
        return self.visual if name == "visual" else self.textual


@dataclass(frozen=True)
class Inputs:
    """Real inputs: images of the task's test set and the prompts of its classes."""

    visual: np.ndarray
    textual: np.ndarray

    def tower(self, name: str) -> np.ndarray:
        return self.visual if name == "visual" else self.textual


@dataclass(frozen=True)
class Gate:
    """What has to hold: max-abs at most `max_abs` (or four times the control), cosine at least `min_cosine`."""

    max_abs: float = 5e-5
    min_cosine: float = 1 - 1e-6


@dataclass(frozen=True)
class Outputs:
    """Embeddings of the same inputs, once for every way of running the model."""

    visual: tuple[np.ndarray, ...]
    textual: tuple[np.ndarray, ...]


def run_in_batches(model: Model, inputs: Inputs, batches: Iterable[int]) -> Outputs:
    """Encode all inputs once per batch size; 0 means all at once."""
    sizes = tuple(batches)
    return Outputs(*(tuple(_encode(model.tower(t), inputs.tower(t), size) for size in sizes) for t in TOWERS))


def _encode(encode: Encode, values: np.ndarray, size: int) -> np.ndarray:
    size = size or len(values)
    return np.concatenate([np.asarray(encode(values[i : i + size])) for i in range(0, len(values), size)])


def compare(reference: Outputs, candidate: Outputs, gate: Gate, control: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One stage of parity as it stands in the report: the worst over all ways of running, and the verdict.

    Differences with NaN or Inf fail whatever the tolerance.
    """
    towers = {name: _tower(getattr(reference, name)[0], getattr(candidate, name)) for name in TOWERS}
    flips, agreement = _flips(reference, candidate)
    worst = {
        "max_abs": max(t["max_abs"] for t in towers.values()),
        "p99_abs": max(t["p99_abs"] for t in towers.values()),
        "min_cosine": min(t["min_cosine"] for t in towers.values()),
        "top1_agreement": agreement,
        "samples": sum(len(getattr(reference, name)[0]) for name in TOWERS),
    }
    tolerance = max(gate.max_abs, CONTROL_FACTOR * control["max_abs"]) if control else gate.max_abs
    passed = worst["max_abs"] <= tolerance and worst["min_cosine"] >= gate.min_cosine and not any(f["margin"] > FLIP_MARGIN for f in flips)
    return worst | {
        "tolerance": tolerance,
        "least_tolerance": worst["max_abs"],
        "min_cosine_required": gate.min_cosine,
        "verdict": "pass" if passed else "fail",
        "control": {key: control[key] for key in ("max_abs", "min_cosine")} if control else None,
        "flips": flips,
        "histogram": _histogram(reference, candidate),
        "towers": towers,
    }


def _tower(reference: np.ndarray, candidates: Sequence[np.ndarray]) -> dict[str, float]:
    differences = np.concatenate([np.abs(_f64(c) - _f64(reference)) for c in candidates])
    cosines = np.concatenate([_cosine(_f64(reference), _f64(c)) for c in candidates])
    finite = bool(np.isfinite(differences).all())
    return {
        "max_abs": float(differences.max()) if finite else float("inf"),
        "p99_abs": float(np.quantile(differences, 0.99)) if finite else float("inf"),
        "min_cosine": float(cosines.min()) if finite else -1.0,
    }


def _f64(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float64)


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def _flips(reference: Outputs, candidate: Outputs) -> tuple[list[dict[str, Any]], float]:
    """Images whose nearest prompt changed, with the cosine margin by which the reference preferred the old one."""
    scores = _f64(reference.visual[0]) @ _f64(reference.textual[0]).T
    wanted = scores.argmax(1)
    flips, seen = [], 0
    for images, texts in zip(candidate.visual, candidate.textual, strict=True):
        found = np.nan_to_num(_f64(images) @ _f64(texts).T, nan=-np.inf).argmax(1)
        seen += len(found)
        flips += [
            {"sample": int(i), "margin": float(scores[i, wanted[i]] - scores[i, found[i]]), "from": int(wanted[i]), "to": int(found[i])}
            for i in np.flatnonzero(found != wanted)
        ]
    return flips, 1 - len(flips) / seen


def _histogram(reference: Outputs, candidate: Outputs) -> dict[str, list[float]]:
    """How many differences fall into each tenth power, from 1e-12 to 1e1."""
    differences = [np.abs(_f64(c) - _f64(getattr(reference, t)[0])).ravel() for t in TOWERS for c in getattr(candidate, t)]
    edges = np.logspace(-12, 1, 27)
    values = np.clip(np.nan_to_num(np.concatenate(differences), nan=10, posinf=10), edges[0], edges[-1])
    return {"edges": edges.tolist(), "counts": np.histogram(values, edges)[0].tolist()}
