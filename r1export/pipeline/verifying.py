"""Verify releases: contents, parity with the unmerged model, proof and latency against the base, and the reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from r1export.adapt.tasks import Task
from r1export.errors import InputError, R1ExportError, Unsupported
from r1export.export.graph import GRAPHS
from r1export.export.release import read_manifest
from r1export.pipeline import expected, gaps
from r1export.pipeline.comparing import TorchOutputs, base_control, merge_parity, onnx_parity
from r1export.pipeline.environment import absent, report_head
from r1export.pipeline.forms import Form
from r1export.pipeline.proving import ladder
from r1export.pipeline.samples import gallery, parity_inputs, test_images
from r1export.pipeline.stage import Stage
from r1export.pipeline.timing import added_latency, speed
from r1export.pipeline.torch_models import TorchModels, torch_models
from r1export.update.factors import ExpertUpdate
from r1export.update.files import sha256_file
from r1export.verify.checks import failed, overall
from r1export.verify.drift import embedding_drift
from r1export.verify.execution import Execution
from r1export.verify.report import settled, write_report
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


def verify(stage: Stage, providers: Sequence[str] = ()) -> dict[str, Any]:
    """Verify every release, in every precision, against the unmerged model; write all reports and return that of the run."""
    run, recipe, providers = stage.run, stage.recipe, tuple(providers) or default_providers()
    if recipe.train.method == "full":
        raise Unsupported("full fine-tuning has no unmerged model to verify against", "use it with r1export train")
    for provider in providers:
        check_provider(provider)
    updates, metrics = run.updates(recipe), run.metrics()
    forms = {Form(stage, precision): _Seen() for precision in ("fp32", *recipe.export.variants)}
    reports: dict[Form, list[dict[str, Any]]] = {form: [] for form in forms}
    measured_gaps = {}
    for number in range(len(updates) + 1):
        outputs = TorchOutputs(stage, parity_inputs(stage, stage.tasks[max(0, number - 1)]))
        for form, seen in forms.items():
            path = form.exports.releases(recipe)[number]
            if not path.exists():
                raise InputError(f"{path}: no such release", f"write it with r1export export {run.path}")
            stage.watch.stage(f"Verifying {form.label(path.name)}")
            found = _verify_release(form, number, updates[:number], outputs, seen, providers)
            gap = found.pop("gaps", None)
            if gap:
                measured_gaps[stage.tasks[number - 1].name] = gap
                run.keep_gaps(number, stage.tasks[number - 1].name, gap)
            accuracy = _accuracy_upto(metrics, number, gap) if form.precision == "fp32" else None
            reports[form].append(settled(found | {"accuracy": accuracy}))
            write_report(reports[form][-1], path)
    releases = [report for listed in reports.values() for report in listed]
    report = report_head(providers) | {
        "verdict": overall(r["verdict"] for r in releases),
        "reasons": [f"{r['release']['name']}: {reason}" for r in releases for reason in r["reasons"]],
        "recipe": recipe.model_dump(mode="json"), "accuracy": _accuracy(metrics) | {"gaps": gaps.summarised(measured_gaps)}, "releases": releases,
    }  # fmt: skip
    write_report(report, run.path)
    return settled(report)


def _verify_release(
    form: Form,
    number: int,
    updates: list[ExpertUpdate],
    outputs: TorchOutputs,
    seen: _Seen,
    providers: tuple[str, ...],
) -> dict[str, Any]:
    """One release. Each step is left out where the one before failed: what is not the release is not measured."""
    stage, path = form.stage, form.exports.releases(form.stage.recipe)[number]
    found = report_head(providers) | {
        "release": {"index": number, "name": form.label(path.name), "precision": form.precision}
    }
    try:
        manifest = read_manifest(path)
        found["contents"] = expected.identity(form, number, path, manifest)
        if failed(found["contents"]):
            return found
        found["release"] |= _release_facts(stage, number, path)
        found["contents"] |= expected.holdings(form, number, path, manifest, updates)
    except R1ExportError as error:
        return found | {
            "verdict": "fail",
            "reasons": [f"{error.message} (write it again: delete {path} and run r1export export)"],
        }
    inputs = outputs.inputs
    with torch_models(stage, number, updates) as models:
        found["parity"] = _parity(form, number, path, outputs, models, seen, providers)
        if form.precision != "fp32" and not failed(found["contents"]):  # what is lost matters most where parity fails
            if not (seen.speed or failed(found["parity"])):
                seen.speed = speed(form, inputs, providers)
            found["variant"] = _variant(form, number, manifest, seen)
        if failed(found["contents"]) or failed(found["parity"]):
            return found
        found["proof"] = ladder(form, number, inputs, updates, seen.executions, providers)
        if form.precision == "fp32":
            found["drift"] = _drift(stage, path, seen)
        if number and not failed(found["proof"]):
            if form.precision == "fp32":
                found["gaps"] = _gaps(stage, stage.tasks[number - 1], outputs, models)
            if seen.executions:  # a base that cannot be run cannot be timed either
                control = found["proof"].get("control")
                found["latency"] = added_latency(form, number, inputs, models, updates, providers, control)
    return found


def _parity(
    form: Form,
    number: int,
    path: Path,
    outputs: TorchOutputs,
    models: TorchModels,
    seen: _Seen,
    providers: tuple[str, ...],
) -> dict[str, Any]:
    """The three stages; the base has only its export, and the merge is the same in every precision."""
    stage = form.stage
    control = seen.controls.get(stage.tasks[number - 1].name) if number else None
    found = onnx_parity(form, path, outputs, models, control, providers)
    if not number:  # its own inputs are those of the first task
        seen.controls[stage.tasks[0].name] = found["export"]
        for task in stage.tasks[1:]:
            asked = TorchOutputs(stage, parity_inputs(stage, task))
            seen.controls[task.name] = base_control(form, path, asked, models, providers)
    if models.pools and form.precision == "fp32":
        found = {"merge": merge_parity(form, outputs, models, control), **found}
    return found


def _variant(form: Form, number: int, manifest: Mapping[str, Any], seen: _Seen) -> dict[str, Any]:
    """What a coarser precision saves and costs against the fp32 release of the same number."""
    single = form.stage.run.releases(form.stage.recipe)[number]
    path, names = form.exports.releases(form.stage.recipe)[number], ("visual.safetensors", "textual.safetensors")
    accuracies = {task["name"]: task["accuracy"] for task in manifest["tasks"]}
    return {
        "precision": form.precision,
        "bytes": {name: (path / name).stat().st_size for name in names},
        "bytes_fp32": {name: (single / name).stat().st_size for name in names},
        "accuracy": accuracies,
        "accuracy_fp32": {task["name"]: task["accuracy"] for task in read_manifest(single)["tasks"]},
        "speed": seen.speed,
    }


def _gaps(stage: Stage, task: Task, outputs: TorchOutputs, models: TorchModels) -> dict[str, Any]:
    """G1 to G3 of one task."""
    scale = float(models.merged.model.logit_scale.exp())
    answers = outputs.inputs.answers
    gap = gaps.exactness(outputs.unmerged(models).last().among(answers), outputs.merged(models).among(answers), scale)
    return gap | gaps.freezing(models.unmerged, models.pools, task, *test_images(stage, task))


def _drift(stage: Stage, path: Path, seen: _Seen) -> dict[str, Any] | None:
    """Against the last release before that could be measured; None for the base."""
    new = gallery(stage, path)
    found = embedding_drift(seen.embeddings[-1][1], new, against=seen.embeddings[-1][0]) if seen.embeddings else None
    seen.embeddings.append((path.name, new))
    return found


def _release_facts(stage: Stage, number: int, path: Path) -> dict[str, Any]:
    base = stage.run.base()
    names = ("visual.safetensors", "textual.safetensors")
    sizes = {name: (path / name).stat().st_size for name in names}
    if number:
        sizes["factors.safetensors"] = (
            (stage.run.task(number, stage.tasks[number - 1].name) / "factors.safetensors").stat().st_size
        )
    return {
        "task": stage.tasks[number - 1].name if number else None, "base": base["name"], "base_sha256": base["sha256"],
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
