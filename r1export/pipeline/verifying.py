"""Verify releases: contents, parity with the unmerged model, proof and latency against the base, and the reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from r1export import __version__
from r1export.adapt.tasks import Task
from r1export.errors import CheckFailed, InputError, R1ExportError
from r1export.export.graph import GRAPHS
from r1export.export.release import read_manifest
from r1export.pipeline import expected, gaps
from r1export.pipeline.environment import environment, now
from r1export.pipeline.proving import added_latency, ladder
from r1export.pipeline.samples import gallery, parity_inputs, test_images
from r1export.pipeline.stage import Stage
from r1export.pipeline.torch_models import TorchModels, encoders, module_boundaries, torch_models
from r1export.run_folder import read_json
from r1export.update.factors import ExpertUpdate
from r1export.update.files import sha256_file
from r1export.verify import parity
from r1export.verify.drift import embedding_drift
from r1export.verify.execution import Execution
from r1export.verify.locate import locate
from r1export.verify.report import overall, settled, write_report
from r1export.verify.runtime import PROVIDERS, open_session, runner

LEVELS = ("disable", "basic", "all")


@dataclass
class _Base:
    """What the base release showed, for the releases after it."""

    control: dict[str, Any] | None = None
    executions: dict[str, Execution] = field(default_factory=dict)
    embeddings: list[tuple[str, np.ndarray]] = field(default_factory=list)


def default_providers() -> tuple[str, ...]:
    """cpu, and cuda where torch and onnxruntime can use it."""
    return (
        ("cpu", "cuda")
        if torch.cuda.is_available() and PROVIDERS["cuda"] in ort.get_available_providers()
        else ("cpu",)
    )


def verify(stage: Stage, providers: Sequence[str] = ()) -> dict[str, Any]:
    """Verify every release against the unmerged model, write all reports, and return the report of the run."""
    run, recipe, providers = stage.run, stage.recipe, tuple(providers) or default_providers()
    updates, metrics = run.updates(recipe), run.metrics()
    releases = run.releases(recipe)[: len(updates) + 1]
    base, reports, measured_gaps = _Base(), [], {}
    for number, path in enumerate(releases):
        if not path.exists():
            raise InputError(f"{path}: no such release", f"write it with r1export export {run.path}")
        stage.watch.stage(f"Verifying {path.name}")
        found = _verify_release(stage, number, releases, updates[:number], base, providers)
        if gap := found.pop("gaps", None):
            measured_gaps[stage.tasks[number - 1].name] = gap
        reports.append(settled(found | {"accuracy": _accuracy_upto(metrics, number, gap)}))
        write_report(reports[-1], path)
    report = {
        "verdict": overall(r["verdict"] for r in reports),
        "reasons": [f"{r['release']['name']}: {reason}" for r in reports for reason in r["reasons"]],
        "created": now(), "r1export": __version__, "recipe": recipe.model_dump(mode="json"),
        "accuracy": _accuracy(metrics) | {"gaps": gaps.summarised(measured_gaps)}, "environment": environment(), "releases": reports,
    }  # fmt: skip
    write_report(report, run.path)
    return settled(report)


def _verify_release(
    stage: Stage,
    number: int,
    releases: list[Path],
    updates: list[ExpertUpdate],
    base: _Base,
    providers: tuple[str, ...],
) -> dict[str, Any]:
    """One release. Each step is left out where the one before failed: what is not the release is not measured."""
    path = releases[number]
    found: dict[str, Any] = {
        "verdict": "pass",
        "reasons": [],
        "created": now(),
        "r1export": __version__,
        "environment": environment(),
    }
    found["release"] = {"index": number, "name": path.name}
    try:
        manifest = read_manifest(path)
        found["contents"] = expected.identity(stage, number, path, manifest)
        if _failed(found["contents"]):
            return found
        found["release"] = _release_facts(stage, number, path)
        found["contents"] |= expected.holdings(stage, number, path, manifest, updates)
    except R1ExportError as error:
        return found | {
            "verdict": "fail",
            "reasons": [f"{error.message} (write it again: delete {path} and run r1export export)"],
        }
    inputs = parity_inputs(stage, stage.tasks[max(0, number - 1)])
    with torch_models(stage, number, updates) as models:
        found["parity"] = _parity(stage, number, path, inputs, models, base, providers)
        if _failed(found["contents"]) or _failed(found["parity"]):
            return found
        found["proof"] = ladder(stage, number, releases, inputs, updates, base.executions, providers)
        found["drift"] = _drift(stage, releases[number], base)
        if number and not _failed(found["proof"]):
            found["gaps"] = _gaps(stage, stage.tasks[number - 1], inputs, models)
            found["latency"] = added_latency(stage, number, releases, inputs, models, updates, providers)
    return found


def _failed(parts: Mapping[str, Any]) -> bool:
    return any(part.get("verdict") == "fail" for part in parts.values())


def _parity(
    stage: Stage,
    number: int,
    path: Path,
    inputs: parity.Inputs,
    models: TorchModels,
    base: _Base,
    providers: tuple[str, ...],
) -> dict[str, Any]:
    """The three stages; the base has only its export. What cannot be run has failed."""
    settings = stage.recipe.verify
    gate = parity.Gate(settings.max_abs, settings.min_cosine)
    batches = tuple(dict.fromkeys((*settings.batches, 0)))  # 0: all samples at once
    facts = {
        "batches": [size or len(inputs.visual) for size in batches],
        "levels": list(LEVELS),
        "providers": list(providers),
    }
    reference = parity.run_in_batches(encoders(models.merged.model), inputs, (0,))
    stages: dict[str, Any] = {}
    trained = parity.run_in_batches(encoders(models.unmerged.model), inputs, (0,)) if models.unmerged else None
    try:
        candidate = parity.Outputs.join(
            parity.run_in_batches(_onnx(path, level, provider), inputs, batches)
            for provider in providers
            for level in LEVELS
        )
        stages["export"] = parity.compare(reference, candidate, gate, base.control) | facts
        if trained:
            stages["total"] = parity.compare(trained, candidate, gate, base.control) | facts
    except CheckFailed as error:
        stages |= {name: parity.failed(str(error)) for name in ("export", *(("total",) if trained else ()))}
    if stages["export"]["verdict"] == "fail":
        stages["export"]["detail"] = _located(stage, path, inputs, models, stages["export"])
    if not number:
        base.control = stages["export"]
    if trained:
        stages = {"merge": parity.compare(trained, reference, gate, base.control) | facts, **stages}
    return stages


def _gaps(stage: Stage, task: Task, inputs: parity.Inputs, models: TorchModels) -> dict[str, Any]:
    """G1 to G3 of one task."""
    frozen, merged = (
        parity.run_in_batches(encoders(clip.model), inputs, (0,)) for clip in (models.unmerged, models.merged)
    )
    gap = gaps.exactness(frozen, merged, float(models.merged.model.logit_scale.exp()))
    return gap | gaps.freezing(models.unmerged, models.pools, task, *test_images(stage, task))


def _located(stage: Stage, path: Path, inputs: parity.Inputs, models: TorchModels, failed: Mapping[str, Any]) -> str:
    """What failed, with the first diverging node of each tower and a reproducer beside the releases."""
    found = [failed.get("detail") or "parity failed"]
    encode, few = encoders(models.merged.model), parity.Inputs(inputs.visual[:2], inputs.textual[:2])
    for tower, name in (("visual", "pixel_values"), ("textual", "input_ids")):
        outputs: list[np.ndarray] = []
        boundaries = module_boundaries(
            models.merged.model, lambda tower=tower, out=outputs: out.append(encode.tower(tower)(few.tower(tower)))
        )
        case = stage.run.path / "failures" / path.name / tower
        try:
            at = locate(path / f"{tower}.onnx", {name: few.tower(tower)}, boundaries, outputs[0], case)
        except CheckFailed as error:
            found.append(f"{tower}.onnx: {error.message}")
            continue
        if at:
            found.append(f"{tower}.onnx: {at}; to reproduce it: {case.relative_to(stage.run.path)}/reproduce.py")
    return "; ".join(found)


def _drift(stage: Stage, path: Path, base: _Base) -> dict[str, Any] | None:
    """Against the last release before that could be measured; None for the base."""
    new = gallery(stage, path)
    found = embedding_drift(base.embeddings[-1][1], new, against=base.embeddings[-1][0]) if base.embeddings else None
    base.embeddings.append((path.name, new))
    return found


def _onnx(path: Path, level: str, provider: str) -> parity.Model:
    visual, textual = (
        runner(open_session(path / f"{tower}.onnx", level=level, provider=provider)) for tower in parity.TOWERS
    )
    return parity.Model(lambda values: visual({"pixel_values": values}), lambda values: textual({"input_ids": values}))


def _release_facts(stage: Stage, number: int, path: Path) -> dict[str, Any]:
    base = read_json(stage.run.path / "run.json", "train the run first")["base"]
    names = ("visual.safetensors", "textual.safetensors")
    sizes = {name: (path / name).stat().st_size for name in names}
    if number:
        sizes["factors.safetensors"] = (
            (stage.run.task(number, stage.tasks[number - 1].name) / "factors.safetensors").stat().st_size
        )
    return {
        "index": number, "name": path.name, "task": stage.tasks[number - 1].name if number else None, "base": base["name"], "base_sha256": base["sha256"],
        "graph": {name: sha256_file(path / name) for name in GRAPHS}, "weights": {name: sha256_file(path / name) for name in names}, "bytes": sizes,
    }  # fmt: skip


def _accuracy(metrics: dict[str, Any]) -> dict[str, Any]:
    return {("matrix" if key == "accuracy" else key): value for key, value in metrics.items()}


def _accuracy_upto(metrics: dict[str, Any], number: int, gap: dict[str, Any] | None) -> dict[str, Any] | None:
    """What was known about accuracy when release `number` was made; the summary belongs to the whole run."""
    if not number:
        return None
    probe = metrics["probe"]
    return {
        "tasks": metrics["tasks"], "zero_shot": metrics["zero_shot"], "matrix": metrics["accuracy"][:number],
        "probe": probe | {"values": probe["values"][: number + 1]} if probe else None, "gaps": gap,
    }  # fmt: skip
