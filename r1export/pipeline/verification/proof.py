"""Prove that a release of a run has no added inference cost: rungs L0 to L4, with the unmerged model as the control."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from r1export.errors import Unsupported
from r1export.pipeline.variant import ReleaseRef
from r1export.pipeline.verification.graph_runs import graph_feeds, run_graphs
from r1export.update.factors import ExpertUpdate
from r1export.update.release_layout import GRAPHS
from r1export.verify import parity, proof
from r1export.verify.proof import Executions, Feeds
from r1export.verify.results import Check, Proof
from r1export.verify.unmerged_graph import add_branches


def release_proof(ref: ReleaseRef, inputs: parity.Inputs, base: Executions, providers: Sequence[str]) -> Proof:
    """Rungs L0 to L4 of a release against the base and its execution.

    The base itself is compared with the graphs that the run exported (L0, L1) and with a second execution of itself (L2 to L4).
    """
    before, reference = (ref.variant.exports.graphs, "the export") if ref.is_base else (ref.base.path, "the base")
    base_graphs, graphs = ({name: folder / name for name in GRAPHS} for folder in (before, ref.path))
    feeds = graph_feeds(inputs, embedding_width(ref))
    run = cache(lambda: run_graphs(ref.path, feeds, providers))
    return proof.prove(base_graphs, graphs, base, run, _control(ref, feeds, run), reference)


def embedding_width(ref: ReleaseRef) -> int:
    clip = ref.context.clip
    return int(clip.encode_text(clip.tokenize([""])).shape[1])


def _control(ref: ReleaseRef, feeds: Mapping[str, Feeds], run: Callable[[], Executions]) -> Check:
    """Whether the rungs detect the unmerged model, in every tower that the last update changes."""
    if ref.is_base:
        return Check.not_applicable("the base release has no experts")
    if not ref.variant.is_reference:
        return Check.not_applicable("the control runs in fp32 only")
    towers = touched_towers(ref, ref.updates[-1:])
    return proof.joined_controls({tower: _tower_control(ref, tower, feeds[f"{tower}.onnx"], run()) for tower in towers})


def _tower_control(ref: ReleaseRef, tower: str, feeds: Feeds, merged: Executions) -> Check:
    graph = f"{tower}.onnx"
    try:
        with unmerged(ref, tower) as path:
            return proof.tell_apart(ref.path / graph, path, feeds, merged.runs.get(f"{graph} on cpu"))
    except Unsupported as error:
        return Check.unmeasured(str(error), of=1)


def touched_towers(ref: ReleaseRef, updates: Sequence[ExpertUpdate]) -> tuple[str, ...]:
    """The towers whose weights `updates` change, visual first."""
    places = ref.variant.weight_map.placements()
    files = {places[name][0] for update in updates for name in update.parameters if name in places}
    return tuple(tower for tower in parity.TOWERS if f"{tower}.safetensors" in files)


@contextmanager
def unmerged(ref: ReleaseRef, tower: str) -> Iterator[Path]:
    """A tower of the previous release, with the branches of the task added to its linears.

    Raises Unsupported: the task changes no linear of the tower.
    """
    weights, before = f"{tower}.safetensors", ref.variant.release(ref.number - 1).path
    with TemporaryDirectory(prefix=".unmerged.", dir=ref.context.run.path) as folder:
        shutil.copyfile(before / weights, Path(folder) / weights)
        yield add_branches(ref.path / f"{tower}.onnx", ref.updates[-1], Path(folder) / f"{tower}.onnx")
