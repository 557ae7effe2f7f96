"""Parity: three errors, never one.

    merge    unmerged torch against merged torch      export   merged torch against ONNX
    total    unmerged torch against ONNX: what the user fields

"Unmerged" is the model with its experts beside the weights and a constant gate. Embeddings have unit norm. The error of
the base model's own export, in the same precision, is the control that the gate is calibrated on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from r1export.errors import CheckFailed

Encode = Callable[[np.ndarray], np.ndarray]
TOWERS = ("visual", "textual")
ENTRIES = {"visual": "pixel_values", "textual": "input_ids"}  # the input of each tower's graph


@dataclass(frozen=True)
class Model:
    """A CLIP as two functions: pixel_values (n, 3, H, W) -> (n, D) and input_ids (n, L) -> (n, D)."""

    visual: Encode
    textual: Encode

    def tower(self, name: str) -> Encode:
        return self.visual if name == "visual" else self.textual


@dataclass(frozen=True)
class Inputs:
    """Real inputs: images of the task's test set and prompts of its classes.

    The first `answers` prompts are those among which a top-1 is chosen: no two of one class. None: all of them.
    """

    visual: np.ndarray
    textual: np.ndarray
    answers: int | None = None

    def tower(self, name: str) -> np.ndarray:
        return self.visual if name == "visual" else self.textual


@dataclass(frozen=True)
class Gate:
    """What has to hold, in one precision.

    max_abs        largest difference of unit-norm embeddings
    min_cosine     lowest cosine of any sample
    flip_margin    a changed top-1 counts only if the reference preferred its class by more than this cosine
    control_factor a merged model may err this many times as much as the base did in the same comparison
    relative       the control alone decides, and the two limits above are its ceiling: what is lost by a coarser
                   precision depends on the model. Otherwise the larger of limit and control decides.
    """

    max_abs: float = 5e-5
    min_cosine: float = 1 - 1e-6
    flip_margin: float = 1e-4
    control_factor: float = 4.0
    relative: bool = False

    def calibrated(self, control: Mapping[str, Any] | None) -> Gate:
        """The gate for a merged model, given the same comparison on the base. A control that failed calibrates nothing."""
        if not control or control.get("verdict") != "pass":
            return self
        allowed, lowest = (
            self.control_factor * control["max_abs"],
            1 - self.control_factor**2 * (1 - control["min_cosine"]),  # 1 - cosine grows with the square of the error
        )
        if self.relative:
            return replace(self, max_abs=min(self.max_abs, allowed), min_cosine=max(self.min_cosine, lowest))
        return replace(self, max_abs=max(self.max_abs, allowed), min_cosine=min(self.min_cosine, lowest))


# fp32: 3e-6 is what a correct export of ViT-B/16 errs by. fp16 rounds each activation to 2^-11: 2e-4 on the built-in
# model. int8 with static scales: 6e-3 and a cosine of 0.9997 there; one doubled scale makes it 6e-2 or more.
GATES = {
    "fp32": Gate(),
    "fp16": Gate(max_abs=5e-3, min_cosine=1 - 1e-4, flip_margin=1e-3, control_factor=3.0, relative=True),
    "bf16": Gate(max_abs=3e-2, min_cosine=1 - 3e-3, flip_margin=1e-2, control_factor=3.0, relative=True),
    "int8": Gate(max_abs=0.1, min_cosine=0.97, flip_margin=0.02, control_factor=4.0, relative=True),
}


@dataclass(frozen=True)
class Outputs:
    """Embeddings of the same inputs, once for every way of running the model."""

    visual: tuple[np.ndarray, ...]
    textual: tuple[np.ndarray, ...]

    @classmethod
    def join(cls, parts: Iterable[Outputs]) -> Outputs:
        """All ways of all `parts`."""
        parts = tuple(parts)
        return cls(*(tuple(way for part in parts for way in getattr(part, tower)) for tower in TOWERS))

    def among(self, answers: int | None) -> Outputs:
        """The same with the first `answers` texts alone."""
        return Outputs(self.visual, tuple(way[:answers] for way in self.textual))

    def last(self) -> Outputs:
        """The last way alone."""
        return Outputs(self.visual[-1:], self.textual[-1:])


def run_in_batches(model: Model, inputs: Inputs, batches: Iterable[int]) -> Outputs:
    """Encode all inputs once per batch size; 0 means all at once. Raises CheckFailed naming the tower and the batch size."""
    sizes = tuple(batches)
    return Outputs(*(tuple(_encode(model, t, inputs.tower(t), size) for size in sizes) for t in TOWERS))


def _encode(model: Model, tower: str, values: np.ndarray, size: int) -> np.ndarray:
    size = size or len(values)
    try:
        found = np.concatenate(
            [np.asarray(model.tower(tower)(values[i : i + size])) for i in range(0, len(values), size)]
        )
    except CheckFailed as error:
        raise CheckFailed(
            f"the {tower} tower fails at batch size {min(size, len(values))}: {error.message}", error.remedy
        ) from error
    if len(found) != len(values):
        raise CheckFailed(
            f"the {tower} tower gives {len(found)} embeddings for {len(values)} inputs at batch size {size}",
            "export the graphs again",
        )
    return found


def compare(
    reference: Outputs,
    candidate: Outputs,
    gate: Gate,
    control: Mapping[str, Any] | None = None,
    answers: int | None = None,
) -> dict[str, Any]:
    """One stage of parity as it stands in the report: the worst over all ways of running, and the verdict.

    Top-1 is chosen among the first `answers` texts. `least_tolerance` is the smallest max_abs that would pass, None where
    none would: for NaN, Inf, a cosine that is too low or a flip that counts.
    """
    towers = {name: _tower(getattr(reference, name)[0], getattr(candidate, name)) for name in TOWERS}
    flips, agreement = _flips(reference.among(answers), candidate.among(answers))
    worst = {
        "max_abs": max(t["max_abs"] for t in towers.values()),
        "p99_abs": max(t["p99_abs"] for t in towers.values()),
        "min_cosine": min(t["min_cosine"] for t in towers.values()),
        "top1_agreement": agreement,
        "samples": sum(len(getattr(reference, name)[0]) for name in TOWERS),
    }
    asked = gate.calibrated(control)
    problems = list(_problems(towers, flips, asked))
    return worst | {
        "tolerance": asked.max_abs,
        "least_tolerance": None if list(_problems(towers, flips, replace(asked, max_abs=np.inf))) else worst["max_abs"],
        "min_cosine_required": asked.min_cosine,
        "verdict": "fail" if problems else "pass",
        "detail": "; ".join(problems) or None,
        "control": {key: control[key] for key in ("max_abs", "min_cosine")} if control else None,
        "flips": flips,
        "histogram": _histogram(reference, candidate),
        "towers": towers,
    }


def figures(reference: Outputs, candidate: Outputs) -> dict[str, float | None]:
    """Largest difference and lowest cosine over both towers and all ways of running; None for NaN, Inf or another shape."""
    towers = [_tower(getattr(reference, name)[0], getattr(candidate, name)) for name in TOWERS]
    worst, lowest = max(tower["max_abs"] for tower in towers), min(tower["min_cosine"] for tower in towers)
    return {"max_abs": worst, "min_cosine": lowest} if np.isfinite(worst) else {"max_abs": None, "min_cosine": None}


def _problems(towers: Mapping[str, Any], flips: Sequence[Mapping[str, Any]], gate: Gate) -> Iterable[str]:
    """What does not hold, in words; written so that NaN never holds."""
    for name, tower in towers.items():
        if not np.isfinite(tower["max_abs"]):
            yield f"the {name} tower gives NaN, Inf or another shape"
        elif not tower["max_abs"] <= gate.max_abs:
            yield f"the {name} tower errs by {tower['max_abs']:.2g}, allowed {gate.max_abs:.2g}"
        elif not tower["min_cosine"] >= gate.min_cosine:
            yield f"the {name} tower's lowest cosine is {tower['min_cosine']:.8f}, required {gate.min_cosine:.8f}"
    if grave := [flip for flip in flips if not flip["margin"] <= gate.flip_margin]:
        yield f"{len(grave)} answers flipped that the reference preferred by more than {gate.flip_margin:g}"


def unrunnable(detail: str) -> dict[str, Any]:
    """The stage of a model that cannot even be run: a failed check, not a crash."""
    figures = dict.fromkeys(("max_abs", "min_cosine", "top1_agreement"))
    return {"verdict": "fail", "detail": detail, **figures, "samples": 0}


def _tower(reference: np.ndarray, candidates: Sequence[np.ndarray]) -> dict[str, float]:
    broken = {"max_abs": float("inf"), "p99_abs": float("inf"), "min_cosine": -1.0}
    if any(c.shape != reference.shape for c in candidates):
        return broken
    with np.errstate(invalid="ignore"):  # Inf - Inf is what is looked for
        differences = np.concatenate([np.abs(_f64(c) - _f64(reference)) for c in candidates])
    if not np.isfinite(differences).all():
        return broken
    cosines = np.concatenate([_cosine(_f64(reference), _f64(c)) for c in candidates])
    return {
        "max_abs": float(differences.max()),
        "p99_abs": float(np.quantile(differences, 0.99)),
        "min_cosine": float(np.nan_to_num(cosines, nan=-1).min()),
    }


def _f64(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float64)


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Row by row; NaN for a row of zeros, which points nowhere."""
    with np.errstate(invalid="ignore"):
        return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def _flips(reference: Outputs, candidate: Outputs) -> tuple[list[dict[str, Any]], float]:
    """Images whose nearest prompt changed, with the cosine margin by which the reference preferred the old one."""
    scores = _f64(reference.visual[0]) @ _f64(reference.textual[0]).T
    wanted = scores.argmax(1)
    flips: list[dict[str, Any]] = []
    seen = 0
    for images, texts in zip(candidate.visual, candidate.textual, strict=True):
        if images.shape != reference.visual[0].shape or texts.shape != reference.textual[0].shape:
            return flips, 0.0
        found = np.nan_to_num(np.nan_to_num(_f64(images)) @ np.nan_to_num(_f64(texts)).T).argmax(1)
        seen += len(found)
        flips += [
            {
                "sample": int(i),
                "margin": float(scores[i, wanted[i]] - scores[i, found[i]]),
                "from": int(wanted[i]),
                "to": int(found[i]),
            }
            for i in np.flatnonzero(found != wanted)
        ]
    return flips, 1 - len(flips) / seen


def _histogram(reference: Outputs, candidate: Outputs) -> dict[str, list[float]] | None:
    """How many differences fall into each half of a power of ten, from 1e-12 to 1e1; None for other shapes."""
    pairs = [(getattr(reference, t)[0], c) for t in TOWERS for c in getattr(candidate, t)]
    if any(one.shape != other.shape for one, other in pairs):
        return None
    with np.errstate(invalid="ignore"):
        differences = [np.abs(_f64(one) - _f64(other)).ravel() for one, other in pairs]
    edges = np.logspace(-12, 1, 27)
    values = np.clip(np.nan_to_num(np.concatenate(differences), nan=10, posinf=10), edges[0], edges[-1])
    return {"edges": edges.tolist(), "counts": np.histogram(values, edges)[0].tolist()}
