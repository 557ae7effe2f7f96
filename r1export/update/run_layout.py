"""The paths in a run folder. Nothing is read, and nothing has to exist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FP32 = "fp32"
BASE = "base"  # the name of release 0
TASKS, FACTORS = "tasks", "factors.safetensors"
WEIGHT_MAP = "weight_map.json"


@dataclass(frozen=True)
class TaskLayout:
    """RUN/tasks/NN-NAME: the results of training one task."""

    path: Path

    @property
    def factors(self) -> Path:
        """The selected experts. Written last, which marks the task as trained."""
        return self.path / FACTORS

    @property
    def pool(self) -> Path:
        """All experts, routers and votes: the unmerged model."""
        return self.path / "pool.safetensors"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.json"

    @property
    def accuracy(self) -> Path:
        """Accuracies after the task."""
        return self.path / "accuracy.json"

    @property
    def directions(self) -> Path:
        """The directions that the task's inputs add to the protected span; only with train.protect."""
        return self.path / "directions.safetensors"

    @property
    def checkpoint(self) -> Path:
        """The state of training, removed at the end."""
        return self.path / "checkpoint.safetensors"


@dataclass(frozen=True)
class VariantLayout:
    """The graphs and releases of a run in one precision; `path` is RUN, or RUN/variants/PRECISION."""

    path: Path

    @property
    def graphs(self) -> Path:
        return self.path / "graphs"

    @property
    def weight_map(self) -> Path:
        return self.graphs / WEIGHT_MAP

    @property
    def ranges(self) -> Path:
        """Smallest and largest input of every int8 linear, from the calibration."""
        return self.graphs / "ranges.json"

    @property
    def releases_folder(self) -> Path:
        return self.path / "releases"

    def release(self, number: int, task_name: str = BASE) -> Path:
        """Folder of the release after task `number`; 0 is the base."""
        return self.releases_folder / f"{number:02d}-{task_name}"

    def releases(self, task_names: Sequence[str]) -> list[Path]:
        """The base's release and that of each task in order, whether they exist yet or not."""
        return [self.release(number, name) for number, name in enumerate((BASE, *task_names))]


@dataclass(frozen=True)
class RunLayout:
    """Paths in the run folder `path`."""

    path: Path

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.toml"

    @property
    def run_json(self) -> Path:
        """Versions, seed, base model and start."""
        return self.path / "run.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.json"

    @property
    def inputs_file(self) -> Path:
        """The images of every task: how many, changes made by decoding, and what was skipped."""
        return self.path / "inputs.json"

    @property
    def zero_shot(self) -> Path:
        """Accuracies of the base model."""
        return self.path / "zero_shot.json"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def variants_folder(self) -> Path:
        return self.path / "variants"

    def variant(self, precision: str = FP32) -> VariantLayout:
        """The graphs and releases in one precision. Those in fp32 lie in the run folder itself."""
        return VariantLayout(self.path if precision == FP32 else self.variants_folder / precision)

    def graphs(self, precision: str = FP32) -> Path:
        """The folder of the graphs."""
        return self.variant(precision).graphs

    def release(self, number: int, task_name: str = BASE, precision: str = FP32) -> Path:
        """Folder of the release after task `number`; 0 is the base."""
        return self.variant(precision).release(number, task_name)

    def releases(self, task_names: Sequence[str], precision: str = FP32) -> list[Path]:
        """The base's release and that of each task in order, whether they exist yet or not."""
        return self.variant(precision).releases(task_names)

    def task(self, number: int, name: str) -> TaskLayout:
        """The folder of task `number`, from 1."""
        return TaskLayout(self.path / TASKS / f"{number:02d}-{name}")

    def trained(self) -> list[TaskLayout]:
        """The tasks whose factors are there, in order of their numbers."""
        return [TaskLayout(path.parent) for path in sorted((self.path / TASKS).glob(f"*/{FACTORS}"))]
