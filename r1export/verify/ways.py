"""The ways in which a release is run for parity, and which of them errs most: where to look first when parity fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from r1export.verify.parity import Outputs


@dataclass(frozen=True)
class Way:
    """One way of running a release; `batch` 0 is all inputs at once."""

    provider: str
    level: str
    batch: int

    def __str__(self) -> str:
        return f"{self.provider} at level {self.level}, {f'batch size {self.batch}' if self.batch else 'all inputs at once'}"


@dataclass(frozen=True)
class Worst:
    """The largest difference of one tower: by which way of running it, and on which input."""

    tower: str
    way: Way
    sample: int
    error: float

    def __str__(self) -> str:
        return f"sample {self.sample} of the {self.tower} tower on {self.way}"


def worst_of(tower: str, reference: Outputs, candidate: Outputs, ways: Sequence[Way]) -> Worst:
    """The worst of a tower over all `ways`, which stand in the order of `candidate`'s; NaN, Inf and other shapes are infinite."""
    errors = np.stack([_errors(getattr(reference, tower)[0], way) for way in getattr(candidate, tower)])
    at, sample = (int(place) for place in np.unravel_index(errors.argmax(), errors.shape))
    return Worst(tower, ways[at], sample, float(errors[at, sample]))


def erring_ways(tower: str, reference: Outputs, candidate: Outputs, ways: Sequence[Way], allowed: float) -> list[Way]:
    """The ways in which a tower errs by more than `allowed`."""
    expected, found = getattr(reference, tower)[0], getattr(candidate, tower)
    return [way for way, output in zip(ways, found, strict=True) if not _errors(expected, output).max() <= allowed]


def unlocated(erring: Sequence[Way]) -> str:
    """What is said of a tower that errs in these ways, where no node parts from torch without the optimiser on cpu."""
    if any(way.provider == "cpu" and way.level == "disable" for way in erring):
        return "no single node parts from torch: the difference adds up over many"
    places = ", ".join(dict.fromkeys(f"level {way.level} on {way.provider}" for way in erring))
    return f"nothing diverges without the optimiser on cpu: the difference arises only at {places}"


def _errors(reference: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Largest difference of each sample."""
    if found.shape != reference.shape:
        return np.full(len(reference), np.inf)
    with np.errstate(invalid="ignore"):  # Inf - Inf is what is looked for
        errors = np.abs(found.astype(np.float64) - reference.astype(np.float64)).max(1)
    return np.where(np.isfinite(errors), errors, np.inf)
