"""A run in one precision: its graphs, releases, weights and tolerances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from r1export.data.task import Task
from r1export.export.precision import version_tensors
from r1export.export.weight_map import WeightMap
from r1export.pipeline.context import RunContext
from r1export.run_folder import read_value
from r1export.update.factors import ExpertUpdate
from r1export.update.manifest import PROCEDURES
from r1export.update.release_manifest import GoldenGate
from r1export.update.run_layout import FP32, VariantLayout
from r1export.verify.parity import GATES, Gate

REFERENCE = FP32  # the trained precision, which the others are compared with


@dataclass(frozen=True)
class Variant:
    """A run in one precision."""

    context: RunContext
    precision: str

    @classmethod
    def all_of(cls, context: RunContext) -> tuple[Variant, ...]:
        """The variants of a run's recipe, fp32 first."""
        return tuple(cls(context, precision) for precision in (REFERENCE, *context.recipe.export.variants))

    @property
    def is_reference(self) -> bool:
        """Whether this is the fp32 variant."""
        return self.precision == REFERENCE

    @property
    def reference(self) -> Variant:
        """The fp32 variant of the same run."""
        return Variant(self.context, REFERENCE)

    @property
    def exports(self) -> VariantLayout:
        return self.context.run.variant(self.precision)

    @property
    def releases(self) -> list[Path]:
        """The release of the base and of each task, whether they exist yet or not."""
        return self.exports.releases([task.name for task in self.context.recipe.stream])

    @property
    def procedure(self) -> str:
        """The merge procedure of this precision."""
        return PROCEDURES[self.precision]

    @property
    def gate(self) -> Gate:
        """The gate of fp32, or the recipe's where that is stricter; other precisions are calibrated on their base, up to a limit."""
        settings = self.context.recipe.verify
        gate = GATES[self.precision]
        return gate.no_laxer_than(settings.max_abs, settings.min_cosine) if self.is_reference else gate

    @property
    def tolerance(self) -> GoldenGate:
        """The tolerance of devices on the golden samples."""
        return GoldenGate(self.gate.max_abs, self.gate.min_cosine)

    def release(self, number: int, updates: Sequence[ExpertUpdate] = ()) -> ReleaseRef:
        """The release after task `number` of the run's `updates`; 0 is the base."""
        path = self.releases[number]
        return ReleaseRef(self, number, self.context.tasks[max(0, number - 1)], tuple(updates[:number]), path)

    def tensors(self, updates: Sequence[ExpertUpdate]) -> dict[str, np.ndarray]:
        """The tensors in the weights files after `updates`. Raises InputError if the graphs are missing."""
        if self.is_reference:
            return self.context.merged(updates)
        return version_tensors(self.context.base, updates, self.weight_map, self._ranges)

    @cached_property
    def weight_map(self) -> WeightMap:
        """The location of each parameter in the weights files. Raises InputError if the graphs are missing."""
        return WeightMap.read(self.exports.weight_map)

    @cached_property
    def _ranges(self) -> dict[str, tuple[float, float]]:
        path, remedy = self.exports.ranges, "export the run again with --overwrite"
        return read_value(dict[str, tuple[float, float]], path, remedy) if path.exists() else {}


@dataclass(frozen=True)
class ReleaseRef:
    """One release of a run in one precision.

    `task` is the last learned task, whose inputs are used to compare the release; for the base, the first task.
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
        """The same release in fp32."""
        return self.variant.reference.release(self.number, self.updates)

    @property
    def learned(self) -> tuple[str, ...]:
        """Names of the merged tasks."""
        return tuple(task.name for task in self.context.tasks[: self.number])

    @property
    def label(self) -> str:
        """The name of the release, with the precision if it is not fp32."""
        return self.path.name if self.variant.is_reference else f"{self.path.name} {self.variant.precision}"
