"""Rung L5 of the proof: base and release timed side by side, in one tower, with the unmerged model and torch beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from r1export.adapt.pool import Batch, routed
from r1export.errors import Unsupported
from r1export.pipeline.variant import Variant
from r1export.pipeline.verification.proof import touched_towers, unmerged
from r1export.pipeline.verification.torch_models import TorchModels, encoders
from r1export.update.factors import ExpertUpdate
from r1export.verify import latency, parity
from r1export.verify.runtime import PROVIDERS, UNTIMED, job, open_session


def added_latency(
    variant: Variant,
    number: int,
    inputs: parity.Inputs,
    models: TorchModels,
    updates: list[ExpertUpdate],
    providers: tuple[str, ...],
    control: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Rung L5 on every provider that can be timed: one input, base and release interleaved; in fp32 torch beside them, and
    the unmerged model if the `control` could run it. None if there is no such provider.

    The visual tower is timed, or the text tower if the updates leave the visual one as it is.
    """
    context, releases = variant.context, variant.releases
    tower = next(iter(touched_towers(variant, updates)), "visual")
    settings, value = context.recipe.verify, inputs.tower(tower)[:1]
    feeds = {parity.ENTRIES[tower]: value}
    base, release = releases[0] / f"{tower}.onnx", releases[number] / f"{tower}.onnx"
    torch_jobs = _torch_jobs(models, tower, value) if variant.precision == "fp32" else None
    found = []
    ran = control is not None and control["unmerged"]["detected"] is not None
    with _branches(variant, number, updates, tower) if ran else nullcontext() as branches:
        for provider in (timed := timeable(providers)):
            with context.progress.track(
                f"Latency on {provider}, base and release interleaved", latency.BLOCKS
            ) as advance:
                found.append(latency.added_latency(
                    opener(base, feeds, provider), opener(release, feeds, provider), pairs=settings.pairs, margin=settings.margin,
                    provider=PROVIDERS[provider], open_unmerged=opener(branches, feeds, provider) if branches else None,
                    torch_jobs=torch_jobs if provider == timed[0] else None, on_block=advance,
                ))  # fmt: skip
    return latency.slowest(found) | {"tower": tower} if found else None


def timeable(providers: Iterable[str]) -> list[str]:
    """The providers whose time says something."""
    return [provider for provider in providers if provider not in UNTIMED]


def speed(variant: Variant, inputs: parity.Inputs, providers: tuple[str, ...]) -> dict[str, Any]:
    """Time of the base in this precision to the base in fp32, on every provider: weights play no part."""
    feeds = {"pixel_values": inputs.visual[:1]}
    graphs = [form.releases[0] / "visual.onnx" for form in (Variant(variant.context, "fp32"), variant)]
    return {
        provider: latency.relative_time(*(opener(graph, feeds, provider) for graph in graphs))
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
def _branches(variant: Variant, number: int, updates: list[ExpertUpdate], tower: str) -> Iterator[Path | None]:
    """The unmerged tower; None where earlier updates alone change it."""
    with ExitStack() as stack:
        path = None
        with suppress(Unsupported):
            path = stack.enter_context(unmerged(variant, number, updates, tower))
        yield path


def _routed(models: TorchModels, tower: str) -> parity.Encode:
    """A tower with a router per input, as in training."""
    encode = encoders(models.unmerged.model).tower(tower)

    def run(values: np.ndarray) -> np.ndarray:
        with routed(models.pools.values(), lambda _: Batch()):
            return encode(values)

    return run


def opener(graph: Path, feeds: dict[str, np.ndarray], provider: str) -> Callable[[], latency.Job]:
    """Opens a fresh session on `graph` and gives the job of running it once on `feeds`."""
    return lambda: job(open_session(graph, provider=provider), feeds, provider)
