"""Rung L5 of the proof: one tower of base and release, timed interleaved, with the unmerged model and torch for comparison."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

import numpy as np

from r1export.adapt.pool import Batch, routed
from r1export.errors import Unsupported
from r1export.pipeline.variant import ReleaseRef, Variant
from r1export.pipeline.verification.proof import touched_towers, unmerged
from r1export.pipeline.verification.torch_models import TorchModels, encoders
from r1export.verify import latency, parity
from r1export.verify.latency import Contenders, Opener, TimingBudget
from r1export.verify.results import Check, Latency, Ratio
from r1export.verify.runtimes.runtime import PROVIDERS, job, open_session
from r1export.verify.steady_timing import steady_timing


def release_latency(
    ref: ReleaseRef,
    inputs: parity.Inputs,
    models: TorchModels,
    control: Check,
    providers: Sequence[str],
    budget: TimingBudget,
) -> Latency:
    """Rung L5 on every provider that can be timed; in fp32 with torch, and with the unmerged model if the `control` could run it.

    The visual tower is timed, or the text tower if the updates leave the visual one as it is.
    """
    tower = next(iter(touched_towers(ref, ref.updates)), "visual")
    feeds, settings = {parity.ENTRIES[tower]: inputs.tower(tower)[:1]}, ref.context.recipe.verify
    torch_jobs = _torch_jobs(models, tower, inputs.tower(tower)[:1]) if ref.variant.is_reference else None
    results = []
    with _branches(ref, tower) if control.looked_at else nullcontext() as branches:
        for provider in (timed := timeable(providers)):
            graphs = {"base": ref.base.path / f"{tower}.onnx", "merged": ref.path / f"{tower}.onnx"}
            contenders = make_contenders(
                graphs | ({"unmerged": branches} if branches else {}),
                feeds,
                provider,
                torch=torch_jobs if provider == timed[0] else None,
            )
            title = f"Latency on {provider}, base and release interleaved"
            with ref.context.progress.track(title, budget.blocks) as advance:
                results.append(latency.added_latency(contenders, settings.pairs, settings.margin, budget, advance))
    return latency.slowest(results, tower)


def make_contenders(
    graphs: Mapping[str, Path],
    feeds: dict[str, np.ndarray],
    provider: str,
    torch: Mapping[str, latency.Job] | None = None,
) -> Contenders:
    """The contenders of "base", "merged" and, where there is one, "unmerged" on one provider; on the CPU by processor time."""
    openers = {name: opener(path, feeds, provider) for name, path in graphs.items()}
    return Contenders(
        PROVIDERS[provider].name,
        base=openers["base"],
        release=openers["merged"],
        unmerged=openers.get("unmerged"),
        torch=torch,
        steady=steady_timing(graphs, feeds) if provider == "cpu" else None,
    )


def timeable(providers: Iterable[str]) -> list[str]:
    """The providers whose latency is meaningful."""
    return [provider for provider in providers if PROVIDERS[provider].timed]


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
def _branches(ref: ReleaseRef, tower: str) -> Iterator[Path | None]:
    """The unmerged tower; None where earlier updates alone change it."""
    with ExitStack() as stack:
        path = None
        with suppress(Unsupported):
            path = stack.enter_context(unmerged(ref, tower))
        yield path


def _routed(models: TorchModels, tower: str) -> parity.Encode:
    """A tower with a router per input, as in training."""
    encode = encoders(models.unmerged.model).tower(tower)

    def run(values: np.ndarray) -> np.ndarray:
        with routed(models.pools.values(), lambda _: Batch()):
            return encode(values)

    return run


def opener(graph: Path, feeds: dict[str, np.ndarray], provider: str) -> Opener:
    """Opens a fresh session on `graph` and gives the job of running it once on `feeds`."""
    return lambda: job(open_session(graph, provider=provider), feeds, provider)
