"""Prove that a release of a run costs nothing extra: the ladder L0 to L4, with the unmerged model as its control."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from r1export.errors import CheckFailed, Unsupported
from r1export.export.weight_map import WeightMap
from r1export.pipeline.variant import Variant
from r1export.update.factors import ExpertUpdate
from r1export.update.release_layout import GRAPHS
from r1export.verify import parity, proof
from r1export.verify.ort_profile import Execution
from r1export.verify.unmerged_graph import add_branches


def ladder(
    variant: Variant,
    number: int,
    inputs: parity.Inputs,
    updates: list[ExpertUpdate],
    seen: dict[str, Execution],
    providers: tuple[str, ...],
) -> dict[str, Any]:
    """Rungs L0 to L4 of a release and, in fp32, the control. `seen` holds what the base ran; the base fills it."""
    context, releases = variant.context, variant.releases
    graphs = [{name: folder / name for name in GRAPHS} for folder in (releases[0], releases[number])]
    embeds = np.zeros((2, context.clip.encode_text(context.clip.tokenize([""])).shape[1]), np.float32)
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
    except (CheckFailed, Unsupported) as error:
        found |= proof.unclimbed(str(error))
    if number and variant.precision == "fp32":
        towers = touched_towers(variant, updates[-1:])
        found["control"] = proof.joined_controls(
            {tower: _control(variant, number, updates, tower, feeds[f"{tower}.onnx"]) for tower in towers}
        )
    return found


def _control(
    variant: Variant, number: int, updates: list[ExpertUpdate], tower: str, feeds: proof.Feeds
) -> dict[str, Any]:
    """Whether the unmerged tower is told apart. A control that gives no answer takes nothing back from the rungs."""
    base = variant.releases[number] / f"{tower}.onnx"
    try:
        with unmerged(variant, number, updates, tower) as path:
            return proof.proof_control(base, path, feeds)
    except (CheckFailed, Unsupported) as error:
        return proof.no_answer(str(error))


def touched_towers(variant: Variant, updates: list[ExpertUpdate]) -> tuple[str, ...]:
    """The towers whose weights `updates` change, visual first. Raises InputError if the graphs are not there."""
    places = WeightMap.read(variant.exports.weight_map).placements()
    files = {places[name][0] for update in updates for name in update.parameters if name in places}
    return tuple(tower for tower in parity.TOWERS if f"{tower}.safetensors" in files)


@contextmanager
def unmerged(variant: Variant, number: int, updates: list[ExpertUpdate], tower: str) -> Iterator[Path]:
    """A tower of the release before, with the branches of the task beside its linears. Raises Unsupported."""
    releases, weights = variant.releases, f"{tower}.safetensors"
    with TemporaryDirectory(prefix=".unmerged.", dir=variant.context.run.path) as folder:
        shutil.copyfile(releases[number - 1] / weights, Path(folder) / weights)
        yield add_branches(releases[number] / f"{tower}.onnx", updates[-1], Path(folder) / f"{tower}.onnx")
