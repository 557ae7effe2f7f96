"""Prove that a release of a run costs nothing extra: the ladder L0 to L5, with the unmerged model as its control."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from r1export.errors import CheckFailed, Unsupported
from r1export.export.graph import GRAPHS
from r1export.pipeline.forms import Form
from r1export.pipeline.stage import Stage
from r1export.pipeline.torch_models import TorchModels, encoders
from r1export.update.factors import ExpertUpdate
from r1export.verify import latency, parity, proof
from r1export.verify.control import add_branches
from r1export.verify.execution import Execution
from r1export.verify.runtime import PROVIDERS, UNTIMED, job, open_session


def ladder(
    form: Form,
    number: int,
    inputs: parity.Inputs,
    updates: list[ExpertUpdate],
    seen: dict[str, Execution],
    providers: tuple[str, ...],
) -> dict[str, Any]:
    """Rungs L0 to L4 of a release and, in fp32, the control. `seen` holds what the base ran; the base fills it."""
    stage, releases = form.stage, form.exports.releases(form.stage.recipe)
    path, folders = releases[number], (releases[0], releases[number])
    graphs = [{name: folder / name for name in GRAPHS} for folder in folders]
    embeds = np.zeros((2, stage.clip.encode_text(stage.clip.tokenize([""])).shape[1]), np.float32)
    feeds = {
        "visual.onnx": {"pixel_values": inputs.visual[:1]}, "textual.onnx": {"input_ids": inputs.textual[:1]},
        "classify.onnx": {"pixel_values": inputs.visual[:1], "class_embeds": embeds},
    }  # fmt: skip
    found = {"same_file": proof.same_files(*graphs), "graph": proof.same_graphs(*graphs)}
    try:
        if not number:
            seen |= proof.executions(graphs[0], feeds, providers)
        found |= (
            proof.rungs(seen, lambda: proof.executions(graphs[1], feeds, providers))
            if seen
            else proof.unclimbed("the base cannot be run")
        )
        if number and seen and form.precision == "fp32":
            with _unmerged(stage, number, releases, updates) as unmerged:
                found["control"] = proof.proof_control(path / "visual.onnx", unmerged, feeds["visual.onnx"])
    except CheckFailed as error:
        found |= proof.unclimbed(error.message)
    except Unsupported as error:
        found["control"] = {"unmerged": {"detected": None, "detail": str(error)}}
    return found


@contextmanager
def _unmerged(stage: Stage, number: int, releases: list[Path], updates: list[ExpertUpdate]) -> Iterator[Path]:
    """The visual graph of the release before, with the branches of the task beside its linears. Raises Unsupported."""
    with TemporaryDirectory(prefix=".unmerged.", dir=stage.run.path) as folder:
        shutil.copyfile(releases[number - 1] / "visual.safetensors", Path(folder) / "visual.safetensors")
        yield add_branches(releases[number] / "visual.onnx", updates[-1], Path(folder) / "visual.onnx")


def added_latency(
    form: Form,
    number: int,
    inputs: parity.Inputs,
    models: TorchModels,
    updates: list[ExpertUpdate],
    providers: tuple[str, ...],
) -> dict[str, Any] | None:
    """Rung L5 on every provider that can be timed: one image, base and release interleaved; in fp32 the unmerged model and
    torch beside them. None if there is no such provider."""
    stage, releases = form.stage, form.exports.releases(form.stage.recipe)
    settings, feeds = stage.recipe.verify, {"pixel_values": inputs.visual[:1]}
    base, release = releases[0] / "visual.onnx", releases[number] / "visual.onnx"
    torch_jobs = _torch_jobs(models, inputs.visual[:1]) if form.precision == "fp32" else None
    found = []
    with _branches_if_any(form, number, releases, updates) as branches:
        for provider in (timed := timeable(providers)):
            with stage.watch.track(f"Latency on {provider}, base and release interleaved", latency.BLOCKS) as advance:
                found.append(latency.added_latency(
                    opener(base, feeds, provider), opener(release, feeds, provider), pairs=settings.pairs, margin=settings.margin,
                    provider=PROVIDERS[provider], open_unmerged=opener(branches, feeds, provider) if branches else None,
                    torch_jobs=torch_jobs if provider == timed[0] else None, on_block=advance,
                ))  # fmt: skip
    return latency.slowest(found) if found else None


def timeable(providers: Iterable[str]) -> list[str]:
    """The providers whose time says something."""
    return [provider for provider in providers if provider not in UNTIMED]


def speed(form: Form, inputs: parity.Inputs, providers: tuple[str, ...]) -> dict[str, Any]:
    """Time of the base in this precision to the base in fp32, on every provider: weights play no part."""
    feeds, recipe = {"pixel_values": inputs.visual[:1]}, form.stage.recipe
    graphs = [exports.releases(recipe)[0] / "visual.onnx" for exports in (form.stage.run, form.exports)]
    return {
        provider: latency.relative_time(*(opener(graph, feeds, provider) for graph in graphs))
        for provider in timeable(providers)
    }


def _torch_jobs(models: TorchModels, values: np.ndarray) -> dict[str, latency.Job]:
    runs = {
        "routed_torch": _routed(models),
        "unmerged_torch": encoders(models.unmerged.model).visual,
        "merged_torch": encoders(models.merged.model).visual,
    }
    return {name: partial(run, values) for name, run in runs.items()}


@contextmanager
def _branches_if_any(
    form: Form, number: int, releases: list[Path], updates: list[ExpertUpdate]
) -> Iterator[Path | None]:
    with ExitStack() as stack:
        path = None
        with suppress(Unsupported):
            if form.precision == "fp32":
                path = stack.enter_context(_unmerged(form.stage, number, releases, updates))
        yield path


def _routed(models: TorchModels) -> parity.Encode:
    """The visual tower with a router per input, as in training."""
    encode = encoders(models.unmerged.model).visual

    def run(values: np.ndarray) -> np.ndarray:
        gates = {rows: pool.gate for rows, pool in models.pools.items()}
        for pool in models.pools.values():
            pool.gate = None
        try:
            return encode(values)
        finally:
            for rows, pool in models.pools.items():
                pool.gate = gates[rows]

    return run


def opener(graph: Path, feeds: dict[str, np.ndarray], provider: str) -> Callable[[], latency.Job]:
    """Opens a fresh session on `graph` and gives the job of running it once on `feeds`."""
    return lambda: job(open_session(graph, provider=provider), feeds, provider)
