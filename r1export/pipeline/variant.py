"""A run in one precision: where its graphs and releases lie, what its weights are, and the gates it has to pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from r1export.data.task import Task
from r1export.export.precision import PROCEDURES, version_tensors
from r1export.export.weight_map import WeightMap
from r1export.pipeline.context import RunContext
from r1export.run_folder import read_value
from r1export.update.factors import ExpertUpdate
from r1export.update.release_manifest import GoldenGate
from r1export.update.run_layout import FP32, VariantLayout
from r1export.verify.parity import GATES, Gate

REFERENCE = FP32  # as trained: the precision that the others are compared with


@dataclass(frozen=True)
class Variant:
    """A run in one precision."""

    context: RunContext
    precision: str

    @classmethod
    def all_of(cls, context: RunContext) -> tuple[Variant, ...]:
        """The variants of a run as its recipe names them, fp32 first."""
        return tuple(cls(context, precision) for precision in (REFERENCE, *context.recipe.export.variants))

    @property
    def is_reference(self) -> bool:
        """Whether this is the run as trained."""
        return self.precision == REFERENCE

    @property
    def reference(self) -> Variant:
        """The same run as trained."""
        return Variant(self.context, REFERENCE)

    @property
    def exports(self) -> VariantLayout:
        return self.context.run.variant(self.precision)

    @property
    def releases(self) -> list[Path]:
        """The base's release and that of each task, whether they exist yet or not."""
        return self.exports.releases([task.name for task in self.context.recipe.stream])

    @property
    def procedure(self) -> str:
        """Name of the arithmetic that merges updates in this precision."""
        return PROCEDURES[self.precision]

    @property
    def gate(self) -> Gate:
        """fp32 by the recipe, where that is stricter; a coarser precision by what its base loses, with a ceiling of its own."""
        settings = self.context.recipe.verify
        gate = GATES[self.precision]
        return gate.no_laxer_than(settings.max_abs, settings.min_cosine) if self.is_reference else gate

    @property
    def tolerance(self) -> GoldenGate:
        """What a device may differ by from the golden samples."""
        return GoldenGate(self.gate.max_abs, self.gate.min_cosine)

    def release(self, number: int, updates: Sequence[ExpertUpdate] = ()) -> ReleaseRef:
        """The release after task `number` of the run's `updates`; 0 is the base."""
        path = self.releases[number]
        return ReleaseRef(self, number, self.context.tasks[max(0, number - 1)], tuple(updates[:number]), path)

    def tensors(self, updates: Sequence[ExpertUpdate]) -> dict[str, np.ndarray]:
        """All that the weights files of the version after `updates` hold. Raises InputError if the graphs are not there."""
        if self.is_reference:
            return self.context.merged(updates)
        return version_tensors(self.context.base, updates, self.weight_map, self._ranges)

    @cached_property
    def weight_map(self) -> WeightMap:
        """Where each parameter lies in the weights files. Raises InputError if the graphs are not there."""
        return WeightMap.read(self.exports.weight_map)

    @cached_property
    def _ranges(self) -> dict[str, tuple[float, float]]:
        path, remedy = self.exports.ranges, "export the run again with --overwrite"
        return read_value(dict[str, tuple[float, float]], path, remedy) if path.exists() else {}


@dataclass(frozen=True)
class ReleaseRef:
    """One release of a run in one precision.

    `task` is the one learned last, on whose inputs the release is compared; for the base it is the first of the run.
    """

    variant: Variant
    number: int
    task: Task
    updates: tuple[ExpertUpdate, ...]
    path: Path

    @property
    def context(self) -> RunContext:
        return self.variant.context

    @property
    def is_base(self) -> bool:
        return not self.number

    @property
    def base(self) -> ReleaseRef:
        """The base release in the same precision."""
        return self.variant.release(0)

    @property
    def reference(self) -> ReleaseRef:
        """The same release as trained."""
        return self.variant.reference.release(self.number, self.updates)

    @property
    def learned(self) -> tuple[str, ...]:
        """Names of the tasks that are merged into it."""
        return tuple(task.name for task in self.context.tasks[: self.number])

    @property
    def label(self) -> str:
        """Name of the release, with the precision if it is not fp32."""
        return self.path.name if self.variant.is_reference else f"{self.path.name} {self.variant.precision}"
