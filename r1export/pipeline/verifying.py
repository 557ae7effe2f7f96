"""Verify releases: parity with the unmerged model, proof and latency against the base, and the reports."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from r1export import __version__
from r1export.adapt.clip import Clip
from r1export.adapt.experts import eject_experts_, load_pool_tensors_
from r1export.adapt.tasks import Task
from r1export.errors import InputError, R1ExportError
from r1export.export.graph import GRAPHS
from r1export.export.release import UNLISTED, read_manifest
from r1export.pipeline.environment import environment, now
from r1export.pipeline.stage import Stage, inject_pools_
from r1export.run_folder import read_json
from r1export.update.container import read_tensors
from r1export.update.factors import ExpertUpdate
from r1export.update.files import sha256_file
from r1export.verify import latency, parity, proof, selftest
from r1export.verify.report import overall, settled, write_report
from r1export.verify.runtime import PROVIDERS, open_session, runner


def verify(stage: Stage) -> dict[str, Any]:
    """Verify every release against the unmerged model, write all reports, and return the report of the run."""
    run, recipe = stage.run, stage.recipe
    updates, metrics = run.updates(recipe), run.metrics()
    releases = run.releases(recipe)[: len(updates) + 1]
    reports: list[dict[str, Any]] = []
    for number, path in enumerate(releases):
        if not path.exists():
            raise InputError(f"{path}: no such release", f"write it with r1export export {run.path}")
        stage.watch.stage(f"Verifying {path.name}")
        control = reports[0]["parity"]["export"] if reports else None
        changed = selftest.changed_files(path, read_manifest(path), UNLISTED)
        found = _verify_damaged(path, changed) if changed else _verify_release(stage, number, releases, updates[:number], control)
        reports.append(settled(found | {"accuracy": _accuracy_upto(metrics, number)}))
        write_report(reports[-1], path)
    report = {
        "verdict": overall(r["verdict"] for r in reports), "reasons": [f"{r['release']['name']}: {reason}" for r in reports for reason in r["reasons"]],
        "created": now(), "r1export": __version__, "recipe": recipe.model_dump(mode="json"), "accuracy": _accuracy(metrics), "environment": environment(), "releases": reports,
    }  # fmt: skip
    write_report(report, run.path)
    return settled(report)


def verify_release(path: Path) -> dict[str, Any]:
    """Verify a release folder by itself, without torch: its files, its graphs, its golden samples, and the base beside it."""
    manifest = read_manifest(path)
    reasons = selftest.changed_files(path, manifest, UNLISTED)
    try:
        reasons += selftest.changed_graphs(path, manifest)
        golden = selftest.golden_parity(path, manifest)
    except (R1ExportError, OSError, ValueError, KeyError) as error:
        golden, reasons = selftest.damaged(error), [*reasons, str(error)]
    base = path.parent / "00-base"
    graphs = [{name: folder / name for name in GRAPHS} for folder in (base, path)]
    beside = base.is_dir() and base != path
    return settled({
        "verdict": "fail" if reasons else "pass", "reasons": reasons, "created": now(), "r1export": __version__,
        "release": {"index": manifest["sequence"], "name": manifest["name"], "base": manifest["base"]["name"], "base_sha256": manifest["base"]["sha256"]},
        "parity": {"export": golden},
        "proof": {"same_file": proof.same_files(*graphs), "graph": proof.same_graphs(*graphs)} if beside and not reasons else {},
        "environment": environment(),
    })  # fmt: skip


def _verify_damaged(path: Path, changed: list[str]) -> dict[str, Any]:
    """A release that is not what was released is not worth measuring."""
    return {
        "verdict": "fail", "reasons": [*changed, f"write it again: delete {path} and run r1export export"], "created": now(), "r1export": __version__,
        "release": {"name": path.name}, "environment": environment(),
    }  # fmt: skip


def _verify_release(stage: Stage, number: int, releases: list[Path], updates: list[ExpertUpdate], control: dict[str, Any] | None) -> dict[str, Any]:
    recipe, path, base = stage.recipe, releases[number], releases[0]
    settings, task = recipe.verify, stage.tasks[max(0, number - 1)]
    inputs = _parity_inputs(stage, task)
    gate = parity.Gate(settings.max_abs, settings.min_cosine)
    sessions = {level: parity.Model(_onnx(path / "visual.onnx", "pixel_values", level), _onnx(path / "textual.onnx", "input_ids", level)) for level in ("disable", "basic", "all")}
    onnx = [parity.run_in_batches(model, inputs, settings.batches) for model in sessions.values()]
    candidate = parity.Outputs(*(tuple(o for outputs in onnx for o in getattr(outputs, tower)) for tower in parity.TOWERS))
    with _torch_models(stage, number, updates) as (unmerged, merged):
        reference = parity.run_in_batches(merged, inputs, (0,))
        stages = {"export": parity.compare(reference, candidate, gate, control)}
        if unmerged:
            trained = parity.run_in_batches(unmerged, inputs, (0,))
            stages |= {"merge": parity.compare(trained, reference, gate, control), "total": parity.compare(trained, candidate, gate, control)}
        facts = {"batches": list(settings.batches), "levels": list(sessions)}
        timing = _latency(stage, path, base, inputs, unmerged, merged) if number else None
    graphs = [{name: folder / name for name in GRAPHS} for folder in (base, path)]
    return {
        "verdict": "pass", "reasons": [], "created": now(), "r1export": __version__, "release": _release_facts(stage, number, path),
        "parity": {name: stages[name] | facts for name in ("merge", "export", "total") if name in stages},
        "proof": {"same_file": proof.same_files(*graphs), "graph": proof.same_graphs(*graphs)},
        "latency": timing, "environment": environment(),
    }  # fmt: skip


def _parity_inputs(stage: Stage, task: Task) -> parity.Inputs:
    """Test images of the task, spread over its classes by a seeded draw, and prompts of its classes."""
    count, rng = stage.recipe.verify.samples, np.random.default_rng(stage.recipe.train.seed)
    images = np.sort(rng.permutation(len(task.test))[:count])
    prompts = [task.templates[i % len(task.templates)].format(name) for i, name in enumerate(task.classes)][:count]
    values = stage.clip.preprocess.normalize(stage.tests[task.name].batch(images))
    return parity.Inputs(values.numpy(), stage.clip.tokenize(prompts).cpu().numpy())


def _onnx(graph: Path, name: str, level: str) -> parity.Encode:
    run = runner(open_session(graph, level=level))
    return lambda values: run({name: values})


@contextmanager
def _torch_models(stage: Stage, number: int, updates: list[ExpertUpdate]) -> Iterator[tuple[parity.Model | None, parity.Model]]:
    """(unmerged, merged) in torch; for the base there is nothing to merge.

    Unmerged is what was trained: the weights before the task, with the selected experts beside them.
    """
    clip = stage.clip
    merged = copy.deepcopy(clip.model)
    try:
        Clip(clip.name, merged, clip.preprocess, clip.tokenizer).load_(stage.merged(updates))
        if not number:
            yield None, _encoders(merged)
            return
        clip.load_(stage.merged(updates[:-1]))
        pools = inject_pools_(clip, stage.recipe)
        load_pool_tensors_(pools, read_tensors(stage.run.task(number, stage.tasks[number - 1].name) / "pool.safetensors"))
        for pool in pools.values():
            pool.freeze_()
        clip.model.eval()
        yield _encoders(clip.model), _encoders(merged)
    finally:
        eject_experts_(clip.model)
        clip.load_(stage.base)


def _encoders(model: torch.nn.Module) -> parity.Model:
    device = model.logit_scale.device

    def call(encode: Callable[..., torch.Tensor]) -> parity.Encode:
        def run(values: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return encode(torch.from_numpy(values).to(device), normalize=True).float().cpu().numpy()

        return run

    return parity.Model(call(model.encode_image), call(model.encode_text))


def _latency(stage: Stage, path: Path, base: Path, inputs: parity.Inputs, unmerged: parity.Model, merged: parity.Model) -> dict[str, Any]:
    settings, image = stage.recipe.verify, inputs.visual[:1]

    def opener(folder: Path) -> Callable[[], latency.Job]:
        def open_one() -> latency.Job:
            run = runner(open_session(folder / "visual.onnx"))
            return lambda: run({"pixel_values": image})

        return open_one

    torch_jobs = {"unmerged_torch": lambda: unmerged.visual(image), "merged_torch": lambda: merged.visual(image)}
    with stage.watch.track("Latency, base and release interleaved", latency.BLOCKS) as advance:
        return latency.added_latency(
            opener(base), opener(path), pairs=settings.pairs, margin=settings.margin, provider=PROVIDERS["cpu"], torch_jobs=torch_jobs, on_block=advance
        )


def _release_facts(stage: Stage, number: int, path: Path) -> dict[str, Any]:
    base = read_json(stage.run.path / "run.json", "train the run first")["base"]
    names = ("visual.safetensors", "textual.safetensors")
    sizes = {name: (path / name).stat().st_size for name in names}
    if number:
        sizes["factors.safetensors"] = (stage.run.task(number, stage.tasks[number - 1].name) / "factors.safetensors").stat().st_size
    return {
        "index": number, "name": path.name, "task": stage.tasks[number - 1].name if number else None, "base": base["name"], "base_sha256": base["sha256"],
        "graph": {name: sha256_file(path / name) for name in GRAPHS}, "weights": {name: sha256_file(path / name) for name in names}, "bytes": sizes,
    }  # fmt: skip


def _accuracy(metrics: dict[str, Any]) -> dict[str, Any]:
    return {("matrix" if key == "accuracy" else key): value for key, value in metrics.items()}


def _accuracy_upto(metrics: dict[str, Any], number: int) -> dict[str, Any] | None:
    """What was known about accuracy when release `number` was made; the summary belongs to the whole run."""
    if not number:
        return None
    probe = metrics["probe"]
    return {
        "tasks": metrics["tasks"], "zero_shot": metrics["zero_shot"], "matrix": metrics["accuracy"][:number],
        "probe": probe | {"values": probe["values"][: number + 1]} if probe else None,
    }  # fmt: skip
