"""Rung L5 of the proof: one tower of the base and of several releases, timed together, with unmerged models to compare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from r1export.adapt.pool import routed
from r1export.adapt.routing import Batch
from r1export.errors import Unsupported
from r1export.pipeline.variant import ReleaseRef, Variant
from r1export.pipeline.verification.contenders import make_contenders, opener, timeable
from r1export.pipeline.verification.proof import touched_towers, unmerged
from r1export.pipeline.verification.torch_models import TorchModels, encoders
from r1export.verify import latency, parity
from r1export.verify.latency import TimingBudget
from r1export.verify.results import Check, Latency, Ratio, Times

OPEN_BYTES = 2.4e9  # weights of sessions that are open at a time: the base twice, each release and its unmerged model
TOGETHER = 8  # releases timed together, at most: the more, the longer it takes until the first is known


@dataclass(frozen=True)
class PendingTiming:
    """A release that waits for rung L5: the tower that is timed, one input of it, and what was measured with its torch models.

    `control` says that the unmerged model can be run.
    """

    ref: ReleaseRef
    tower: str
    values: np.ndarray
    control: bool
    torch: Mapping[str, Times]

    @property
    def graph(self) -> str:
        return f"{self.tower}.onnx"

    @property
    def together(self) -> tuple[Variant, str, tuple[int, ...]]:
        """What releases that are timed together have in common."""
        return self.ref.variant, self.tower, self.values.shape


def prepare_timing(ref: ReleaseRef, inputs: parity.Inputs, models: TorchModels, control: Check) -> PendingTiming:
    """Prepare rung L5: the visual tower, or the text tower if the updates leave the visual one as it is; torch in fp32 only."""
    tower = next(iter(touched_towers(ref, ref.updates)), "visual")
    values = inputs.tower(tower)[:1]
    torch = latency.torch_times(_torch_jobs(models, tower, values)) if ref.variant.is_reference else {}
    return PendingTiming(ref, tower, values, bool(control.looked_at), torch)


def group_size(base: ReleaseRef) -> int:
    """How many releases are timed together: as many as fit in OPEN_BYTES, at most TOGETHER."""
    tower = max((base.path / f"{tower}.safetensors").stat().st_size for tower in parity.TOWERS)
    return max(1, min(TOGETHER, int(OPEN_BYTES / (2 * tower)) - 1))


def release_latencies(
    waiting: Sequence[PendingTiming], providers: Sequence[str], budget: TimingBudget
) -> list[Latency]:
    """Rung L5 of each, on every provider that can be timed."""
    groups: dict[object, list[PendingTiming]] = {}
    for one in waiting:
        groups.setdefault(one.together, []).append(one)
    found = {
        one.ref.path: result
        for group in groups.values()
        for one, result in zip(group, _time_together(group, providers, budget), strict=True)
    }
    return [found[one.ref.path] for one in waiting]


def _time_together(group: Sequence[PendingTiming], providers: Sequence[str], budget: TimingBudget) -> list[Latency]:
    first, timed = group[0], timeable(providers)
    settings, progress = first.ref.context.recipe.verify, first.ref.context.progress
    feeds = {parity.ENTRIES[first.tower]: first.values}
    results: dict[str, list[Latency]] = {one.ref.path.name: [] for one in group}
    with ExitStack() as stack:
        controls = {one.ref.path.name: stack.enter_context(_unmerged(one)) for one in group if one.control}
        for provider in timed:
            contenders = make_contenders(
                first.ref.base.path / first.graph,
                {one.ref.path.name: one.ref.path / one.graph for one in group},
                {name: path for name, path in controls.items() if path},
                feeds,
                provider,
            )
            title = f"Latency on {provider}, base and {_count(group)} together"
            with progress.track(title, budget.blocks) as advance:
                found = latency.added_latency(contenders, settings.pairs, settings.margin, budget, advance)
            for name, result in found.items():
                results[name].append(result)
    return [_with_torch(latency.slowest(results[one.ref.path.name], one.tower), one.torch) for one in group]


def _count(group: Sequence[PendingTiming]) -> str:
    return "release" if len(group) == 1 else f"{len(group)} releases"


def _with_torch(result: Latency, times: Mapping[str, Times]) -> Latency:
    """The result with the times of torch in the table of the first provider."""
    tables = dict(result.providers or {})
    for provider in list(tables)[:1]:
        tables[provider] = {"1": dict(tables[provider]["1"]) | dict(times)}
    return replace(result, providers=tables or None)


def variant_speed(
    variant: Variant, inputs: parity.Inputs, providers: Sequence[str], budget: TimingBudget
) -> dict[str, Ratio]:
    """Time of the base in this precision over the base in fp32, on every provider: weights play no part."""
    feeds = {"pixel_values": inputs.visual[:1]}
    graphs = [one.release(0).path / "visual.onnx" for one in (variant.reference, variant)]
    return {
        provider: latency.relative_time(opener(graphs[0], feeds, provider), opener(graphs[1], feeds, provider), budget)
        for provider in timeable(providers)
    }


def _torch_jobs(models: TorchModels, tower: str, values: np.ndarray) -> dict[str, latency.Job]:
    runs = {
        "routed_torch": _routed(models, tower),
        "unmerged_torch": encoders(models.unmerged.model).tower(tower),
        "merged_torch": encoders(models.merged.model).tower(tower),
    }
    return {name: partial(run, values) for name, run in runs.items()}


@contextmanager
def _unmerged(one: PendingTiming) -> Iterator[Path | None]:
    """The unmerged tower; None where earlier updates alone change it."""
    with ExitStack() as stack:
        path = None
        with suppress(Unsupported):
            path = stack.enter_context(unmerged(one.ref, one.tower))
        yield path


def _routed(models: TorchModels, tower: str) -> parity.Encode:
    """A tower with a router per input, as in training."""
    encode = encoders(models.unmerged.model).tower(tower)

    def run(values: np.ndarray) -> np.ndarray:
        with routed(models.pools.values(), lambda _: Batch()):
            return encode(values)

    return run
