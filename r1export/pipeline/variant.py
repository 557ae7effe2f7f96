"""One precision of a run: where its graphs and releases lie, what its weights are, and the gates it has to pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from r1export.export.precision import version_tensors
from r1export.export.weight_map import WeightMap
from r1export.pipeline.context import RunContext
from r1export.run_folder import read_value
from r1export.update.factors import ExpertUpdate
from r1export.update.release_manifest import GoldenGate
from r1export.update.run_layout import VariantLayout
from r1export.verify.parity import GATES, Gate


@dataclass(frozen=True)
class Variant:
    """A run in one precision."""

    context: RunContext
    precision: str

    @property
    def exports(self) -> VariantLayout:
        return self.context.run.variant(self.precision)

    @property
    def releases(self) -> list[Path]:
        """The base's release and that of each task, whether they exist yet or not."""
        return self.exports.releases([task.name for task in self.context.recipe.stream])

    @property
    def gate(self) -> Gate:
        """fp32 by the recipe; a coarser precision by what its base loses, with a ceiling of its own."""
        settings = self.context.recipe.verify
        if self.precision == "fp32":
            return replace(GATES["fp32"], max_abs=settings.max_abs, min_cosine=settings.min_cosine)
        return GATES[self.precision]

    @property
    def tolerance(self) -> GoldenGate:
        """What a device may differ by from the golden samples."""
        return GoldenGate(self.gate.max_abs, self.gate.min_cosine)

    def label(self, release: str) -> str:
        """How reports call a release."""
        return release if self.precision == "fp32" else f"{release} {self.precision}"

    def tensors(self, updates: Sequence[ExpertUpdate]) -> dict[str, np.ndarray]:
        """All that the weights files of the version after `updates` hold. Raises InputError if the graphs are not there."""
        if self.precision == "fp32":
            return self.context.merged(updates)
        return version_tensors(self.context.base, updates, *self._layout)

    @cached_property
    def _layout(self) -> tuple[WeightMap, dict[str, tuple[float, float]]]:
        path, remedy = self.exports.ranges, "export the run again with --overwrite"
        ranges = read_value(dict[str, tuple[float, float]], path, remedy) if path.exists() else {}
        return WeightMap.read(self.exports.weight_map), ranges
