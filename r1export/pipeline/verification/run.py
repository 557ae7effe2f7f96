"""Verify releases: contents, parity with the unmerged model, proof and latency against the base, and the reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from r1export.data.task import Task
from r1export.errors import InputError, R1ExportError, Unsupported
from r1export.pipeline.context import RunContext
from r1export.pipeline.environment import absent, report_head
from r1export.pipeline.variant import Variant
from r1export.pipeline.verification import contents, freezing_gaps
from r1export.pipeline.verification.inputs import gallery, parity_inputs, test_images
from r1export.pipeline.verification.latency import added_latency, speed
from r1export.pipeline.verification.parity import TorchOutputs, base_control, merge_parity, onnx_parity
from r1export.pipeline.verification.proof import ladder
from r1export.pipeline.verification.torch_models import TorchModels, torch_models
from r1export.report.checks import failed, overall
from r1export.report.write import settled, write_report
from r1export.update.atomic_io import sha256_file
from r1export.update.factors import ExpertUpdate
from r1export.update.release_layout import GRAPHS
from r1export.update.release_manifest import ReleaseManifest
from r1export.verify.drift import embedding_drift
from r1export.verify.ort_profile import Execution
from r1export.verify.runtime import check_provider


@dataclass
class _Seen:
    """What the base release showed in one precision, for the releases after it."""

    controls: dict[str, dict[str, Any]] = field(default_factory=dict)  # by task: its export parity on the task's inputs
    executions: dict[str, Execution] = field(default_factory=dict)
    embeddings: list[tuple[str, np.ndarray]] = field(default_factory=list)
    speed: dict[str, Any] | None = None


def default_providers() -> tuple[str, ...]:
    """cpu, and cuda where torch and onnxruntime can use it."""
    return ("cpu",) if absent("cuda") else ("cpu", "cuda")


def verify_run(context: RunContext, providers: Sequence[str] = ()) -> dict[str, Any]:
    """Verify every release, in every precision, against the unmerged model; write all reports and return that of the run."""
    run, recipe, providers = context.run, context.recipe, tuple(providers) or default_providers()
    if recipe.train.method == "full":
        raise Unsupported("full fine-tuning has no unmerged model to verify against", "use it with r1export train")
    for provider in providers:
        check_provider(provider)
    updates, metrics = run.updates(recipe), run.metrics().to_json()
    variants = {Variant(context, precision): _Seen() for precision in ("fp32", *recipe.export.variants)}
    reports: dict[Variant, list[dict[str, Any]]] = {variant: [] for variant in variants}
    measured_gaps = {}
    for number in range(len(updates) + 1):
        outputs = TorchOutputs(context, parity_inputs(context, context.tasks[max(0, number - 1)]))
        for variant, seen in variants.items():
            path = variant.releases[number]
            if not path.exists():
                raise InputError(f"{path}: no such release", f"write it with r1export export {run.path}")
            context.progress.step(f"Verifying {variant.label(path.name)}")
            found = _verify_release(variant, number, updates[:number], outputs, seen, providers)
            gap = found.pop("gaps", None)
            if gap:
                measured_gaps[context.tasks[number - 1].name] = gap
                run.keep_gaps(number, context.tasks[number - 1].name, gap)
            accuracy = _accuracy_upto(metrics, number, gap) if variant.precision == "fp32" else None
            reports[variant].append(settled(found | {"accuracy": accuracy}))
            write_report(reports[variant][-1], path)
    releases = [report for listed in reports.values() for report in listed]
    report = report_head(providers) | {
        "verdict": overall(r["verdict"] for r in releases),
        "reasons": [f"{r['release']['name']}: {reason}" for r in releases for reason in r["reasons"]],
        "recipe": recipe.model_dump(mode="json"), "accuracy": _accuracy(metrics) | {"gaps": freezing_gaps.summarised(measured_gaps)}, "releases": releases,
    }  # fmt: skip
    write_report(report, run.path)
    return settled(report)


def _verify_release(
    variant: Variant,
    number: int,
    updates: list[ExpertUpdate],
    outputs: TorchOutputs,
    seen: _Seen,
    providers: tuple[str, ...],
) -> dict[str, Any]:
    """One release. Each step is left out where the one before failed: what is not the release is not measured."""
    context, path = variant.context, variant.releases[number]
    found = report_head(providers) | {
        "release": {"index": number, "name": variant.label(path.name), "precision": variant.precision}
    }
    try:
        manifest = ReleaseManifest.read(path).to_json()
        found["contents"] = contents.identity(variant, number, path, manifest)
        if failed(found["contents"]):
            return found
        found["release"] |= _release_facts(context, number, path)
        found["contents"] |= contents.holdings(variant, number, path, manifest, updates)
    except R1ExportError as error:
        return found | {
            "verdict": "fail",
            "reasons": [f"{error.message} (write it again: delete {path} and run r1export export)"],
        }
    inputs = outputs.inputs
    with torch_models(context, number, updates) as models:
        found["parity"] = _parity(variant, number, path, outputs, models, seen, providers)
        if variant.precision != "fp32" and not failed(
            found["contents"]
        ):  # what is lost matters most where parity fails
            if not (seen.speed or failed(found["parity"])):
                seen.speed = speed(variant, inputs, providers)
            found["variant"] = _variant(variant, number, manifest, seen)
        if failed(found["contents"]) or failed(found["parity"]):
            return found
        found["proof"] = ladder(variant, number, inputs, updates, seen.executions, providers)
        if variant.precision == "fp32":
            found["drift"] = _drift(context, path, seen)
        if number and not failed(found["proof"]):
            if variant.precision == "fp32":
                found["gaps"] = _gaps(context, context.tasks[number - 1], outputs, models)
            if seen.executions:  # a base that cannot be run cannot be timed either
                control = found["proof"].get("control")
                found["latency"] = added_latency(variant, number, inputs, models, updates, providers, control)
    return found


def _parity(
    variant: Variant,
    number: int,
    path: Path,
    outputs: TorchOutputs,
    models: TorchModels,
    seen: _Seen,
    providers: tuple[str, ...],
) -> dict[str, Any]:
    """The three stages; the base has only its export, and the merge is the same in every precision."""
    context = variant.context
    control = seen.controls.get(context.tasks[number - 1].name) if number else None
    found = onnx_parity(variant, path, outputs, models, control, providers)
    if not number:  # its own inputs are those of the first task
        seen.controls[context.tasks[0].name] = found["export"]
        for task in context.tasks[1:]:
            asked = TorchOutputs(context, parity_inputs(context, task))
            seen.controls[task.name] = base_control(variant, path, asked, models, providers)
    if models.pools and variant.precision == "fp32":
        found = {"merge": merge_parity(variant, outputs, models, control), **found}
    return found


def _variant(variant: Variant, number: int, manifest: Mapping[str, Any], seen: _Seen) -> dict[str, Any]:
    """What a coarser precision saves and costs against the fp32 release of the same number."""
    single = Variant(variant.context, "fp32").releases[number]
    path, names = (
        variant.releases[number],
        ("visual.safetensors", "textual.safetensors"),
    )
    accuracies = {task["name"]: task["accuracy"] for task in manifest["tasks"]}
    return {
        "precision": variant.precision,
        "bytes": {name: (path / name).stat().st_size for name in names},
        "bytes_fp32": {name: (single / name).stat().st_size for name in names},
        "accuracy": accuracies,
        "accuracy_fp32": {task.name: task.accuracy for task in ReleaseManifest.read(single).tasks},
        "speed": seen.speed,
    }


def _gaps(context: RunContext, task: Task, outputs: TorchOutputs, models: TorchModels) -> dict[str, Any]:
    """G1 to G3 of one task."""
    scale = float(models.merged.model.logit_scale.exp())
    answers = outputs.inputs.answers
    gap = freezing_gaps.exactness(
        outputs.unmerged(models).last().among(answers), outputs.merged(models).among(answers), scale
    )
    return gap | freezing_gaps.freezing(models.unmerged, models.pools, task, *test_images(context, task))


def _drift(context: RunContext, path: Path, seen: _Seen) -> dict[str, Any] | None:
    """Against the last release before that could be measured; None for the base."""
    new = gallery(context, path)
    found = embedding_drift(seen.embeddings[-1][1], new, against=seen.embeddings[-1][0]) if seen.embeddings else None
    seen.embeddings.append((path.name, new))
    return found


def _release_facts(context: RunContext, number: int, path: Path) -> dict[str, Any]:
    base = context.run.base()
    names = ("visual.safetensors", "textual.safetensors")
    sizes = {name: (path / name).stat().st_size for name in names}
    if number:
        sizes["factors.safetensors"] = (context.run.task(number, context.tasks[number - 1].name).factors).stat().st_size
    return {
        "task": context.tasks[number - 1].name if number else None, "base": base.name, "base_sha256": base.sha256,
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
