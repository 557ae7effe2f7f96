"""Proof of zero added latency in five rungs, from identical files to identical cost.

L0 same file      base and release use byte-identical .onnx files
L1 graph          their structure has the same digest
L2 optimized      and so has the graph that the runtime's optimizer makes of it, per provider
L3 executed ops   the profiled kernels are the same: operator, provider, types and shapes
L4 cost           equal FLOPs, weight bytes and peak memory
The unmerged model, exported with its branches, is the control: rungs that don't detect it have no power.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from r1export.errors import CheckFailed, Unsupported
from r1export.update.atomic_io import sha256_file
from r1export.verify.graph_digest import graph_digest
from r1export.verify.results import Check, Proof, Rung
from r1export.verify.runtimes import openvino_program
from r1export.verify.runtimes.ort_profile import Execution, execute
from r1export.verify.runtimes.runtime import PROVIDERS

PEAK_TOLERANCE = 0.01  # thread scheduling moves the allocator's peak by a block
Feeds = Mapping[str, np.ndarray]
Graphs = Mapping[str, Path]  # by file name


@dataclass(frozen=True)
class Executions:
    """The execution of every graph on every inspectable provider, keyed "GRAPH on PROVIDER".

    `problem` says why something could not be run: a failure if the runtime rejects the model (`refused`), else a limit of
    the environment.
    """

    runs: Mapping[str, Execution]
    problem: str = ""
    refused: bool = False


def execute_graphs(graphs: Graphs, feeds: Mapping[str, Feeds], providers: Iterable[str]) -> Executions:
    """Run every graph once on every inspectable provider (on cpu if there is none)."""
    inspectable = [provider for provider in providers if PROVIDERS[provider].inspectable] or ["cpu"]
    try:
        runs = {
            f"{name} on {provider}": _execute(path, feeds[name], provider)
            for provider in inspectable
            for name, path in graphs.items()
        }
    except (CheckFailed, Unsupported) as error:
        return Executions({}, str(error), isinstance(error, CheckFailed))
    return Executions(runs)


def _execute(graph: Path, feeds: Feeds, provider: str) -> Execution:
    return openvino_program.execute(graph, feeds) if provider == "openvino" else execute(graph, feeds, provider)


def prove(
    base: Graphs,
    release: Graphs,
    base_executions: Executions,
    run_release: Callable[[], Executions],
    control: Check,
    reference: str = "the base",
) -> Proof:
    """The rungs L0 to L4. `base` names the required graphs; the release is run if the base could be run.

    `reference` says in messages whose graphs `base` are.
    """
    same_file, graph = _same_files(base, release, reference), _same_graphs(base, release)
    if not base_executions.runs:
        rungs = [Rung.unmeasured(f"cannot run the base: {base_executions.problem}")] * 3
    elif not (executions := run_release()).runs:
        outcome = Rung.failed if executions.refused else Rung.unmeasured
        rungs = [outcome(executions.problem)] * 3
    else:
        rungs = [rung(base_executions.runs, executions.runs) for rung in (_same_optimized, _same_ops, _same_cost)]
    optimized_graph, executed_ops, cost = rungs
    return Proof(
        same_file=same_file, graph=graph, optimized_graph=optimized_graph, executed_ops=executed_ops, cost=cost, control=control
    )  # fmt: skip


def _same_files(base: Graphs, release: Graphs, reference: str) -> Rung:
    """Rung L0. A missing file is a failed rung."""
    digests = {name: (_sha256(path), _sha256(release[name])) for name, path in base.items()}
    problems = [f"{name} is missing from {reference}" for name, path in base.items() if not path.is_file()]
    problems += [f"{name} differs from {reference}'s" for name, (left, right) in digests.items() if left != right]
    return _rung(digests, problems, f"{', '.join(base)} are byte-identical", of=len(base))


def _sha256(path: Path) -> str:
    return sha256_file(path) if path.is_file() else f"{path.name} is missing"


def _same_graphs(base: Graphs, release: Graphs) -> Rung:
    """Rung L1. A file that is not a graph is a failed rung."""
    digests = {name: (_graph_digest(path), _graph_digest(release[name])) for name, path in base.items()}
    problems = [f"{name} has another structure" for name, (left, right) in digests.items() if left != right]
    return _rung(digests, problems, "same nodes, attributes, edges, opsets, inputs and outputs", of=len(base))


def _graph_digest(path: Path) -> str:
    try:
        return graph_digest(path)
    except CheckFailed as error:
        return error.message


def _same_optimized(base: Mapping[str, Execution], release: Mapping[str, Execution]) -> Rung:
    digests = {name: (run.optimized_digest, release[name].optimized_digest) for name, run in base.items()}
    problems = [f"{name}: the optimized graph differs" for name, (left, right) in digests.items() if left != right]
    nodes = ", ".join(f"{name}: {run.optimized_nodes} nodes" for name, run in release.items())
    return _rung(digests, problems, f"the same after all optimizer passes ({nodes})", of=len(base))


def _same_ops(base: Mapping[str, Execution], release: Mapping[str, Execution]) -> Rung:
    digests = {name: (run.ops_digest, release[name].ops_digest) for name, run in base.items()}
    problems = [
        f"{name} runs different kernels ({_more_ops(base[name], release[name])})"
        for name, (left, right) in digests.items()
        if left != right
    ]
    count = ", ".join(f"{name}: {len(run.kernels)}" for name, run in release.items())
    return _rung(digests, problems, f"the same kernels in the same order ({count})", of=len(base))


def _more_ops(base: Execution, release: Execution) -> str:
    """The difference in executed operators: `+2 Cast, -1 Add`."""
    before, after = base.count(), release.count()
    changes = {op: after[op] - before[op] for op in sorted(before | after) if after[op] != before[op]}
    return ", ".join(f"{count:+d} {op}" for op, count in changes.items()) or "different order, shapes or providers"


def _same_cost(base: Mapping[str, Execution], release: Mapping[str, Execution]) -> Rung:
    problems = [problem for name, run in base.items() for problem in _cost_problems(name, run, release[name])]
    digests = {name: (_cost_digest(run), _cost_digest(release[name])) for name, run in base.items()}
    return _rung(digests, problems, "; ".join(_cost(name, run) for name, run in release.items()), of=len(base))


def _cost_problems(name: str, base: Execution, release: Execution) -> Iterable[str]:
    if base.flops != release.flops:
        yield f"{name}: {release.flops} FLOPs, the base {base.flops}"
    if base.weight_bytes != release.weight_bytes:
        yield f"{name}: {release.weight_bytes} weight bytes, the base {base.weight_bytes}"
    if base.peak_bytes and release.peak_bytes and abs(release.peak_bytes / base.peak_bytes - 1) > PEAK_TOLERANCE:
        yield f"{name}: peak memory {release.peak_bytes} bytes, the base {base.peak_bytes}"


def _cost_digest(run: Execution) -> str:
    """The exactly compared figures; peak memory has a tolerance and is not included."""
    return repr((run.flops, run.weight_bytes))


def _cost(name: str, run: Execution) -> str:
    peak = f"{run.peak_bytes / 1e6:.1f} MB peak memory" if run.peak_bytes else "peak memory unknown"
    flops = "" if run.flops is None else f"{run.flops / 1e6:.1f} MFLOPs, "
    return f"{name}: {flops}{run.weight_bytes / 1e6:.1f} MB of weights, {peak}"


def _rung(digests: Mapping[str, tuple[str, str]], problems: Iterable[str], detail: str, *, of: int) -> Rung:
    """One rung from the digests (base, release) of each graph."""
    expected, digest = (
        hashlib.sha256("".join(pair[side] for pair in digests.values()).encode()).hexdigest() for side in (0, 1)
    )
    return Rung.judge(problems, looked_at=len(digests), of=of, detail=detail, digest=digest, expected=expected)


def tell_apart(base: Path, unmerged: Path, feeds: Feeds, executed: Execution | None = None) -> Check:
    """Whether L1, L2 and L3 detect an unmerged tower. The digests of L1 and L2 are structural, so weights don't matter.

    `executed` is what the base ran on the CPU, if that is known already.
    A control that fails to run is inconclusive.
    """
    try:
        graphs = [graph_digest(path, structural=True) for path in (base, unmerged)]
        runs = [executed or _execute(base, feeds, "cpu"), _execute(unmerged, feeds, "cpu")]
    except (CheckFailed, Unsupported) as error:
        return Check.unmeasured(str(error), of=1)
    told_apart = {
        "L1": graphs[0] != graphs[1],
        "L2": runs[0].optimized_digest != runs[1].optimized_digest,
        "L3": runs[0].ops_digest != runs[1].ops_digest,
    }
    blind = [rung for rung, apart in told_apart.items() if not apart]
    problems = [f"{', '.join(blind)} did not detect the unmerged model"] if blind else []
    detail = f"detected by {', '.join(told_apart)}; the branches run {_more_ops(*runs)}{_times_flops(*runs)}"
    return Check.judge(problems, looked_at=1, of=1, detail=detail)


def _times_flops(base: Execution, other: Execution) -> str:
    return f": {other.flops / base.flops:.3f} times the FLOPs" if base.flops and other.flops else ""


def joined_controls(by_tower: Mapping[str, Check]) -> Check:
    """One control of several towers, which must be detected in all of them."""
    if not by_tower:
        return Check.unmeasured("the update changes no weight of either tower")
    return Check.joined(replace(check, detail=f"{tower} tower: {check.detail}") for tower, check in by_tower.items())
