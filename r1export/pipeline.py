"""From a recipe to verified releases: the one module that knows the order of the steps.

train    zero-shot -> for each task: train the pools, pack the selected experts, merge, evaluate
export   the graphs once -> for each release: weights, class embeddings, golden samples, manifest
verify   for each release: parity, proof, latency -> reports
"""

from __future__ import annotations

import copy
import platform
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from r1export import __version__
from r1export.adapt.clip import Clip, digest, load_clip
from r1export.adapt.evaluate import accuracy, class_embeddings
from r1export.adapt.experts import eject_experts_, inject_experts_, load_pool_tensors_, pack_experts, pool_tensors, remember_
from r1export.adapt.metrics import stream_metrics
from r1export.adapt.pixels import Pixels
from r1export.adapt.pool import PoolSettings
from r1export.adapt.sources import expand_path, load_task
from r1export.adapt.tasks import Task, few_shot
from r1export.adapt.trainer import Pools, Step, TrainSettings, reset_pools_, train_pools_
from r1export.adapt.world import BUILTIN_MODELS
from r1export.errors import InputError, R1ExportError, Unsupported
from r1export.export.graph import GRAPHS, export_graphs
from r1export.export.release import UNLISTED, Golden, ReleaseContent, TaskClasses, read_manifest, refused_writes, write_release
from r1export.recipe import Recipe, TaskSource
from r1export.run_folder import RunFolder, read_json
from r1export.update.container import read_tensors, write_tensors
from r1export.update.factors import ExpertUpdate
from r1export.update.files import new_folder, sha256_file, write_json
from r1export.verify import latency, parity, proof, selftest
from r1export.verify.report import overall, settled, write_report
from r1export.verify.runtime import PROVIDERS, open_session, runner

Track = Callable[..., None]
GOLDEN_IMAGES = 8  # images in golden.safetensors, spread over the tasks: 4.8 MB at 224 px


class Watcher(Protocol):
    """Somebody who looks on."""

    def stage(self, title: str) -> None:
        """A new step begins."""

    def track(self, title: str, total: int) -> AbstractContextManager[Track]:
        """A bar: the block calls `advance(note="")` once per unit of work."""


class Silent:
    """Nobody looks on."""

    def stage(self, title: str) -> None:
        pass

    @contextmanager
    def track(self, title: str, total: int) -> Iterator[Track]:
        yield lambda note="": None


@dataclass(frozen=True)
class Stage:
    """What all steps work on: the run, its base model and its tasks, loaded when first used."""

    run: RunFolder | None
    recipe: Recipe
    device: str
    watch: Watcher

    def at(self, run: RunFolder) -> Stage:
        """The same stage, its model and tasks kept, in a run folder."""
        moved = replace(self, run=run)
        moved.__dict__.update({name: value for name, value in self.__dict__.items() if name not in moved.__dict__})
        return moved

    @cached_property
    def clip(self) -> Clip:
        """The base model; steps that change its weights put them back."""
        self.watch.stage("Loading the base model")
        return load_base(self.recipe, self.device)

    @cached_property
    def base(self) -> dict[str, np.ndarray]:
        return self.clip.parameters()

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        self.watch.stage("Reading the tasks")
        return tuple(self._task(source) for source in self.recipe.stream)

    @cached_property
    def probe(self) -> Task | None:
        return self._task(self.recipe.probe, test_only=True) if self.recipe.probe else None

    @cached_property
    def tests(self) -> dict[str, Pixels]:
        """Decoded test images by task name, the probe's included."""
        return {task.name: Pixels(task.test, self.clip.preprocess) for task in (*self.tasks, *((self.probe,) if self.probe else ()))}

    def merged(self, updates: Sequence[ExpertUpdate]) -> dict[str, np.ndarray]:
        """All parameters after `updates`, always from the base."""
        return self.base | ExpertUpdate.stack(updates).apply(self.base)

    def _task(self, source: TaskSource, *, test_only: bool = False) -> Task:
        data, seed = self.recipe.data, self.recipe.train.seed
        root = expand_path(data.root) if data.root else None
        task = load_task(source.source, name=source.name, root=root, templates=source.templates, download=data.download, test_only=test_only)
        train = task.train if test_only else few_shot(task.train, data.shots, seed)
        test = task.test
        if data.test_limit and len(test) > data.test_limit:
            test = test.subset(np.sort(np.random.default_rng(seed).permutation(len(test))[: data.test_limit]))
        return Task(task.name, task.classes, task.templates, train, test)


def load_base(recipe: Recipe, device: str = "cpu") -> Clip:
    """The base model that a recipe names."""
    base = recipe.base
    if base.model.startswith("builtin:"):
        name = base.model.removeprefix("builtin:")
        if name not in BUILTIN_MODELS:
            raise InputError(f"base.model: no builtin model {name!r}", f"known: {', '.join(BUILTIN_MODELS)}")
        return load_clip(weights=BUILTIN_MODELS[name].weights, config=BUILTIN_MODELS[name].config, device=device)
    paths = {name: expand_path(value) if value else None for name, value in (("weights", base.weights), ("config", base.config))}
    return load_clip(base.model, pretrained=base.pretrained, device=device, **paths)


def choose_device(wanted: str) -> str:
    """`auto` is cuda where there is one. Raises Unsupported for a cuda that is not there."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise Unsupported("this machine has no usable CUDA device", "use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def check_inputs(stage: Stage) -> None:
    """Load the model and the tasks and try the pools, so that bad input is found before anything is written."""
    _inject(stage.clip, stage.recipe)
    eject_experts_(stage.clip.model)
    for task in (*stage.tasks, *((stage.probe,) if stage.probe else ())):
        task.test.read(0)


# --- train -----------------------------------------------------------------------------------------------------------


def train(stage: Stage) -> dict[str, Any]:
    """Learn every task that is not yet learned and return metrics.json. Goes on where an earlier run stopped."""
    run, recipe = stage.run, stage.recipe
    with refused_writes(run.path):
        _write_run_json(stage)
        zero_shot = _remembered(run.path / "zero_shot.json", lambda: _evaluate(stage, "Zero-shot"))
        rows, updates = [], []
        for number, task in enumerate(stage.tasks, 1):
            folder = run.task(number, task.name)
            if not (folder / "factors.safetensors").exists():
                _learn(stage, number, task, updates, folder)
            updates.append(ExpertUpdate.read(folder / "factors.safetensors"))
            stage.clip.load_(stage.merged(updates))
            rows.append(_remembered(folder / "accuracy.json", lambda task=task: _evaluate(stage, f"After {task.name}")))
        stage.clip.load_(stage.base)
        metrics = _metrics(recipe, zero_shot, rows)
        write_json(run.metrics_file, metrics)
    return metrics


def _remembered(path: Path, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What `compute` gave, from `path` if it was computed before."""
    if not path.exists():
        write_json(path, compute())
    return read_json(path, "delete the file and run again with --resume")


def _write_run_json(stage: Stage) -> None:
    path = stage.run.path / "run.json"
    base = {"name": stage.recipe.base.model or stage.clip.name, "sha256": digest(stage.base)}
    if path.exists() and read_json(path, "start anew with --overwrite")["base"] != base:
        raise InputError(f"{path}: the run was started from another base model", "give back the weights it was started with, or --overwrite")
    if not path.exists():
        write_json(path, {"r1export": __version__, "seed": stage.recipe.train.seed, "base": base, "versions": versions(), "started": _now()})


def _evaluate(stage: Stage, title: str) -> dict[str, float]:
    """Accuracy of the model as it stands on every task and the probe, by name."""
    tasks = (*stage.tasks, *((stage.probe,) if stage.probe else ()))
    found = {}
    with stage.watch.track(f"{title}: accuracy", len(tasks)) as advance:
        for task in tasks:
            found[task.name] = accuracy(stage.clip, task, stage.tests[task.name])
            advance(f"{task.name} {100 * found[task.name]:.1f} %")
    return found


def _learn(stage: Stage, number: int, task: Task, earlier: list[ExpertUpdate], folder: Path) -> None:
    """Train one task and write its folder: factors.safetensors last, since it says that the task is learned."""
    recipe, started = stage.recipe, time.perf_counter()
    stage.clip.load_(stage.merged(earlier))
    pools = _inject(stage.clip, recipe)
    try:
        reset_pools_(pools, recipe.train.seed, number)
        if earlier:
            remember_(pools, ExpertUpdate.stack(earlier))
        folder.mkdir(parents=True, exist_ok=True)
        pixels = Pixels(task.train, stage.clip.preprocess)
        with stage.watch.track(f"Task {number} of {len(stage.tasks)}: {task.name}", recipe.train.iterations) as advance:
            losses = train_pools_(
                stage.clip, pools, task, pixels, TrainSettings(**recipe.train.model_dump()), number=number,
                checkpoint=folder / "checkpoint.safetensors", on_step=lambda step: advance(_note(step)),
            )  # fmt: skip
        update = pack_experts(pools)
        write_tensors(folder / "pool.safetensors", pool_tensors(pools))
        write_json(
            folder / "metrics.json",
            {
                "task": task.name, "images": len(task.train), "losses": losses, "seconds": time.perf_counter() - started, "peak_rss_mb": _peak_rss_mb(),
                "trainable_parameters": sum(p.numel() for pool in pools.values() for p in pool.parameters()), "factor_bytes": update.nbytes,
            },
        )  # fmt: skip
        update.write(folder / "factors.safetensors")
    finally:
        eject_experts_(stage.clip.model)


def _inject(clip: Clip, recipe: Recipe) -> Pools:
    pool = recipe.pool
    settings = PoolSettings(pool.rank, pool.k_train, pool.k_merge, pool.alpha, pool.dropout)
    return inject_experts_(clip.model, settings, towers=pool.towers, targets=pool.targets)


def _note(step: Step) -> str:
    return f"loss {step.loss:.3f}" + (f" + {step.orthogonality:.3f}" if step.orthogonality else "")


def _metrics(recipe: Recipe, zero_shot: dict[str, float], rows: list[dict[str, float]]) -> dict[str, Any]:
    names = [task.name for task in recipe.stream]
    matrix = [[row[name] for name in names] for row in rows]
    summary = stream_metrics(matrix)
    probe = recipe.probe.name if recipe.probe else None
    return {
        "tasks": names, "zero_shot": [zero_shot[name] for name in names], "accuracy": matrix,
        "zero_shot_avg": float(np.mean([zero_shot[name] for name in names])),
        "transfer": summary.transfer, "avg": summary.avg, "last": summary.last, "forgetting": list(summary.forgetting),
        "probe": {"name": probe, "values": [zero_shot[probe], *(row[probe] for row in rows)]} if probe else None,
    }  # fmt: skip


# --- export ----------------------------------------------------------------------------------------------------------


def export(stage: Stage, *, overwrite: bool = False) -> list[Path]:
    """Write the graphs, if they are not there, and every release that is not there; returns the release folders."""
    run, recipe = stage.run, stage.recipe
    if overwrite:
        for folder in (run.graphs, run.path / "releases"):
            shutil.rmtree(folder, ignore_errors=True)
    metrics, updates = run.metrics(), run.updates(recipe)
    with refused_writes(run.path):
        if not run.graphs.exists():
            stage.watch.stage("Exporting the graphs, once")
            with new_folder(run.graphs) as folder:
                export_graphs(stage.clip.model, stage.clip.preprocess.size, stage.clip.tokenize([""]).shape[1], folder, opset=recipe.export.opset)
        releases = run.releases(recipe)[: len(updates) + 1]
        with stage.watch.track("Writing releases", len(releases)) as advance:
            for number, path in enumerate(releases):
                if not path.exists():
                    _release(stage, number, path, updates[:number], metrics)
                advance(path.name)
    return releases


def _release(stage: Stage, number: int, path: Path, updates: list[ExpertUpdate], metrics: dict[str, Any]) -> None:
    run, recipe, clip = stage.run, stage.recipe, stage.clip
    weights = stage.merged(updates)
    clip.load_(weights)
    learned = {task.name for task in stage.tasks[:number]}
    accuracies = dict(zip(metrics["tasks"], metrics["accuracy"][number - 1] if number else metrics["zero_shot"], strict=True))
    content = ReleaseContent(
        name=path.name,
        sequence=number,
        base=read_json(run.path / "run.json", "train the run first")["base"],
        updates=tuple({"task": t.name, "sha256": sha256_file(run.task(i, t.name) / "factors.safetensors")} for i, t in enumerate(recipe.stream[:number], 1)),
        weights=weights,
        tasks=tuple(TaskClasses(t.name, t.classes, t.templates, class_embeddings(clip, t), t.name in learned) for t in stage.tasks),
        golden=_golden(stage),
        preprocess=clip.preprocess.to_json(),
        tokenizer=clip.tokenizer,
        graph_digests={graph: proof.graph_digest(run.graphs / graph) for graph in GRAPHS},
        accuracy=accuracies,
        versions={"r1export": __version__} | versions(),
        tolerance={"max_abs": recipe.verify.max_abs, "min_cosine": recipe.verify.min_cosine},
    )
    write_release(content, run.graphs, path)
    clip.load_(stage.base)


@torch.inference_mode()
def _golden(stage: Stage) -> Golden:
    """Real test images of all tasks in turn, a prompt of each, and what torch makes of them."""
    clip, tasks = stage.clip, stage.tasks
    picks = [(tasks[i % len(tasks)], i // len(tasks)) for i in range(GOLDEN_IMAGES)]
    pixels = torch.cat([stage.tests[task.name].batch(np.array([place % len(task.test)])) for task, place in picks])
    tokens = clip.tokenize([task.templates[0].format(task.classes[place % len(task.classes)]) for task, place in picks])
    values = clip.preprocess.normalize(pixels)
    return Golden(values.numpy(), clip.encode_image(pixels).float().cpu().numpy(), tokens.cpu().numpy(), clip.encode_text(tokens).float().cpu().numpy())


# --- verify ----------------------------------------------------------------------------------------------------------


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
        "created": _now(), "r1export": __version__, "recipe": recipe.model_dump(mode="json"), "accuracy": _accuracy(metrics), "environment": environment(), "releases": reports,
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
        "verdict": "fail" if reasons else "pass", "reasons": reasons, "created": _now(), "r1export": __version__,
        "release": {"index": manifest["sequence"], "name": manifest["name"], "base": manifest["base"]["name"], "base_sha256": manifest["base"]["sha256"]},
        "parity": {"export": golden},
        "proof": {"same_file": proof.same_files(*graphs), "graph": proof.same_graphs(*graphs)} if beside and not reasons else {},
        "environment": environment(),
    })  # fmt: skip


def _verify_damaged(path: Path, changed: list[str]) -> dict[str, Any]:
    """A release that is not what was released is not worth measuring."""
    return {
        "verdict": "fail", "reasons": [*changed, f"write it again: delete {path} and run r1export export"], "created": _now(), "r1export": __version__,
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
        "verdict": "pass", "reasons": [], "created": _now(), "r1export": __version__, "release": _release_facts(stage, number, path),
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
        pools = _inject(clip, stage.recipe)
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


# --- environment -----------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    import onnx
    import onnxruntime
    import open_clip

    return {
        "python": platform.python_version(), "torch": torch.__version__, "open_clip": open_clip.__version__, "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__, "numpy": np.__version__,
    }  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions and the machine, for reports."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return versions() | {"cpu": _cpu_name(), "threads": torch.get_num_threads(), "os": f"{platform.system()} {platform.machine()}", "gpu": gpu}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _peak_rss_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
