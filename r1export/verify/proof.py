"""Zero added latency as a ladder of evidence, from "the same file" up to "the same time".

L0 same file      base and release use byte-identical .onnx files
L1 graph          the program in them has the same digest
L2 optimised      so has what the runtime makes of it, per provider
L3 executed ops   the profiled kernels are the same: operator, provider, types and shapes
L4 cost           equal arithmetic, weight bytes and peak memory
The unmerged model, exported with its branches, is the control: rungs that cannot tell it apart prove nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from r1export.errors import CheckFailed
from r1export.update.atomic_io import sha256_file
from r1export.verify import openvino_program
from r1export.verify.graph_digest import graph_digest
from r1export.verify.ort_profile import Execution, execute

OPAQUE = ("tensorrt", "reference")  # an engine that onnxruntime cannot write out; no optimiser at all
PEAK_TOLERANCE = 0.01  # where threads take turns, the allocator's peak moves by a block
Feeds = Mapping[str, np.ndarray]


def same_files(base: Mapping[str, Path], release: Mapping[str, Path]) -> dict[str, Any]:
    """Rung L0. A missing file is a failed rung."""
    digests = {name: (_sha256(path), _sha256(release[name])) for name, path in base.items()}
    return _rung(digests, f"{', '.join(base)} are byte-identical", "differs: {}")


def _sha256(path: Path) -> str:
    return sha256_file(path) if path.exists() else "-"


def same_graphs(base: Mapping[str, Path], release: Mapping[str, Path]) -> dict[str, Any]:
    """Rung L1. A file that is no graph is a failed rung."""
    digests = {name: (_digest(path), _digest(release[name])) for name, path in base.items()}
    return _rung(digests, "same nodes, attributes, edges, opsets, inputs and outputs", "another program: {}")


def _digest(path: Path) -> str:
    try:
        return graph_digest(path)
    except CheckFailed as error:
        return error.message


def executions(
    graphs: Mapping[str, Path], feeds: Mapping[str, Feeds], providers: Iterable[str]
) -> dict[str, Execution]:
    """Run every graph once on every provider that shows its program (if none does, on cpu), keyed "GRAPH on PROVIDER".

    Raises CheckFailed and Unsupported as `execute` does.
    """
    shown = [provider for provider in providers if provider not in OPAQUE] or ["cpu"]
    return {
        f"{name} on {provider}": _execute(path, feeds[name], provider)
        for provider in shown
        for name, path in graphs.items()
    }


def _execute(graph: Path, feeds: Feeds, provider: str) -> Execution:
    return openvino_program.execute(graph, feeds) if provider == "openvino" else execute(graph, feeds, provider)


def rungs(base: Mapping[str, Execution], release: Callable[[], Mapping[str, Execution]]) -> dict[str, dict[str, Any]]:
    """Rungs L2 to L4; all three fail if the release cannot be run."""
    try:
        found = release()
    except CheckFailed as error:
        return {
            name: {"verdict": "fail", "digest": None, "expected": None, "detail": str(error)}
            for name in ("optimized_graph", "executed_ops", "cost")
        }
    return {
        "optimized_graph": _same_optimized(base, found),
        "executed_ops": _same_ops(base, found),
        "cost": _same_cost(base, found),
    }


def unclimbed(reason: str) -> dict[str, dict[str, Any]]:
    """Rungs L2 to L4 that were to be climbed and could not be: neither passed nor failed, and no pass without them."""
    return {
        name: {"verdict": "inconclusive", "digest": None, "expected": None, "detail": reason}
        for name in ("optimized_graph", "executed_ops", "cost")
    }


def _same_optimized(base: Mapping[str, Execution], release: Mapping[str, Execution]) -> dict[str, Any]:
    digests = {name: (e.optimized_digest, release[name].optimized_digest) for name, e in base.items()}
    nodes = ", ".join(f"{name}: {e.optimized_nodes} nodes" for name, e in release.items())
    return _rung(
        digests, f"the same after all of the optimiser's passes ({nodes})", "optimised into another program: {}"
    )


def _same_ops(base: Mapping[str, Execution], release: Mapping[str, Execution]) -> dict[str, Any]:
    digests = {name: (e.ops_digest, release[name].ops_digest) for name, e in base.items()}
    differing = [
        f"{name} ({_more_ops(base[name], release[name])})" for name in base if digests[name][0] != digests[name][1]
    ]
    count = ", ".join(f"{name}: {len(e.kernels)}" for name, e in release.items())
    return _rung(digests, f"the same kernels in the same order ({count})", f"other kernels: {'; '.join(differing)}")


def _more_ops(base: Execution, release: Execution) -> str:
    """What the release runs more or less often: `+2 Cast, -1 Add`."""
    one, other = base.count(), release.count()
    changes = {op: other[op] - one[op] for op in sorted(one | other) if other[op] != one[op]}
    return ", ".join(f"{count:+d} {op}" for op, count in changes.items()) or "other order, shapes or providers"


def _same_cost(base: Mapping[str, Execution], release: Mapping[str, Execution]) -> dict[str, Any]:
    problems = []
    for name, one in base.items():
        other = release[name]
        for what, a, b in (("FLOPs", one.flops, other.flops), ("weight bytes", one.weight_bytes, other.weight_bytes)):
            if a != b:
                problems.append(f"{name}: {b} {what}, the base {a}")
        if one.peak_bytes and other.peak_bytes and abs(other.peak_bytes / one.peak_bytes - 1) > PEAK_TOLERANCE:
            problems.append(f"{name}: {other.peak_bytes} bytes at its peak, the base {one.peak_bytes}")
    facts = "; ".join(_cost(name, e) for name, e in release.items())
    return {
        "verdict": "fail" if problems else "pass",
        "digest": _cost_digest(release),
        "expected": _cost_digest(base),
        "detail": "; ".join(problems) or facts,
    }


def _cost_digest(executions: Mapping[str, Execution]) -> str:
    """SHA-256 of all that has to be exactly equal; the peak of memory has a tolerance and is not in it."""
    costs = sorted((name, e.flops, e.weight_bytes) for name, e in executions.items())
    return hashlib.sha256(repr(costs).encode()).hexdigest()


def _cost(name: str, e: Execution) -> str:
    peak = f"{_megabytes(e.peak_bytes)} at its peak" if e.peak_bytes else "peak not told"
    flops = "" if e.flops is None else f"{e.flops / 1e6:.1f} MFLOPs, "
    return f"{name}: {flops}{_megabytes(e.weight_bytes)} of weights, {peak}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def proof_control(base: Path, unmerged: Path, feeds: Feeds, provider: str = "cpu") -> dict[str, Any]:
    """Whether L1, L2 and L3 tell an unmerged tower from the base. The digests of L1 and L2 are structural, so weights play no part.

    Raises CheckFailed if one of them cannot be run.
    """
    graphs = [graph_digest(path, structural=True) for path in (base, unmerged)]
    runs = [_execute(path, feeds, provider) for path in (base, unmerged)]
    seen = {
        "L1": graphs[0] != graphs[1],
        "L2": runs[0].optimized_digest != runs[1].optimized_digest,
        "L3": runs[0].ops_digest != runs[1].ops_digest,
    }
    blind = [rung for rung, told in seen.items() if not told]
    more = f"the exported branches run {_more_ops(*runs)}{_times_flops(*runs)}"
    detail = (
        f"{', '.join(blind)} cannot tell the unmerged model from the base"
        if blind
        else f"told apart by {', '.join(seen)}; {more}"
    )
    return {"unmerged": {"detected": not blind, "detail": detail}}


def no_answer(reason: str) -> dict[str, Any]:
    """A control that was tried and could not be run: the rungs may be blind."""
    return {"unmerged": {"detected": None, "detail": reason}}


def joined_controls(by_tower: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One control of several towers, which has to be told apart in all of them."""
    if not by_tower:
        return no_answer("the update changes no weight of either tower")
    controls = {tower: control["unmerged"] for tower, control in by_tower.items()}
    told = [control["detected"] for control in controls.values()]
    detected = False if False in told else None if None in told else True
    return {
        "unmerged": {
            "detected": detected,
            "detail": "; ".join(f"{tower} tower: {control['detail']}" for tower, control in controls.items()),
        }
    }


def _times_flops(base: Execution, other: Execution) -> str:
    return f": {other.flops / base.flops:.3f} times the FLOPs" if base.flops and other.flops else ""


def _rung(digests: Mapping[str, tuple[str, str]], same: str, other: str) -> dict[str, Any]:
    """One rung from (base, release) digests by name."""
    differing = [name for name, (one, two) in digests.items() if one != two]
    expected, found = (
        hashlib.sha256("".join(pair[i] for pair in digests.values()).encode()).hexdigest() for i in (0, 1)
    )
    detail = other.format(", ".join(differing)) if differing else same
    return {"verdict": "fail" if differing else "pass", "digest": found, "expected": expected, "detail": detail}
