"""r1export: the graphs once, a release for the base and one for the task, `r1export verify`, and a signed update.

The task is the scanned digits, for its images and class names; its experts are not trained but given the numbers of the
LoRA that all contenders merge.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from peers.contender import FIRST_LINEAR, enter, onnx_embeddings, release_bytes, run, timed, versions
from peers.mapping import rows_of
from peers.row import Fault, Row, Said
from peers.workload import ALPHA, RANK, parity, read_samples
from r1export import __version__
from r1export.adapt.inject import eject_experts_
from r1export.adapt.pack import pack_experts, pool_tensors
from r1export.adapt.preprocess_settings import OPENAI
from r1export.pipeline.context import NoProgress, RunContext, inject_pools_
from r1export.pipeline.export import export_releases
from r1export.pipeline.train import train_tasks
from r1export.recipe import Recipe
from r1export.run_folder import RunFolder, open_run, read_json
from r1export.update.atomic_io import write_file
from r1export.update.container import read_layout, write_tensors
from r1export.update.envelope import SecretKey
from r1export.update.factors import Rows
from r1export.update.lab.publish import Step, Terms, make_bundle
from r1export.update.release_layout import GRAPHS

KEY = SecretKey(bytes(range(32)))
TERMS = Terms(created=1_800_000_000)
VERIFY = "from r1export.cli import main; main()"
# The program with the scaling counted twice in every merge, in export and in verify.
TWICE = f"""
from r1export.update.factors import ExpertUpdate, Factors
apply = ExpertUpdate.apply
def faulty(self, base, **options):
    twice = {{rows: Factors(pair.u * {ALPHA / RANK:.0f}, pair.v) for rows, pair in self.factors.items()}}
    return apply(ExpertUpdate(twice), base, **options)
ExpertUpdate.apply = faulty
"""


def build(work: Path) -> Row:
    folder = work / "r1export"
    seconds: dict[str, float] = {}
    context = planted_run(work, folder / "run")
    run_folder, recipe = context.run, context.recipe
    factors = run_folder.task(1, "digits").factors
    factors.rename(factors.with_suffix(".later"))
    with timed(seconds, "first"):
        export_releases(fresh(context))
    factors.with_suffix(".later").rename(factors)
    with timed(seconds, "later"):
        export_releases(fresh(context))
    with timed(seconds, "bundle"):
        write_file(folder / "update.r1u", make_bundle(run_folder.path, Step(1), [KEY], TERMS).to_bytes())
    base, release = run_folder.releases([task.name for task in recipe.stream])
    graphs = {"image_embeds": release / "visual.onnx", "text_embeds": release / "textual.onnx"}
    return {
        "versions": {"r1export": __version__} | versions("torch", "open_clip_torch", "onnx", "onnxruntime-gpu", "onnxruntime"),
        "first_seconds": seconds["first"], "later_seconds": seconds["later"], "bundle_seconds": seconds["bundle"],
        "release_bytes": release_bytes(*(release / name for name in (*GRAPHS, "visual.safetensors", "textual.safetensors"))),
        "update_bytes": release_bytes(folder / "update.r1u"), "factor_bytes": release_bytes(factors),
        "parity": parity(onnx_embeddings(graphs, read_samples(work)), work),
        "check_on_the_sound_model": verified(run_folder),
        "faults": faults(work, folder, run_folder),
        "graphs": {"base": {"graph": str(base / "visual.onnx")}, "adapted": {"graph": str(release / "visual.onnx")}},
    }  # fmt: skip


def planted_run(work: Path, path: Path) -> RunContext:
    """A run whose one task has learned exactly the LoRA of `work`."""
    recipe = Recipe.model_validate({
        "base": {"weights": str(work / "open_clip.safetensors"), "config": str(work / "open_clip.json")} | OPENAI.given,
        "tasks": [{"name": "digits", "source": "builtin:digits"}],
        "data": {"test_limit": 40, "shots": 4},
        "pool": {"rank": RANK, "k_train": RANK, "k_merge": RANK, "alpha": ALPHA, "dropout": 0.0},
    })  # fmt: skip
    context = RunContext(open_run(path, recipe, resume=False, overwrite=True), recipe, "cpu", NoProgress())
    pools = inject_pools_(context.clip, recipe)
    for pool in pools.values():
        pool.reset_(torch.Generator().manual_seed(0))
    lora = read_lora(work)
    assert lora.keys() == pools.keys(), "the LoRA and the pools adapt different linears"
    for rows, (lora_A, lora_B) in lora.items():
        pools[rows].lora_A.data.copy_(torch.from_numpy(lora_A))
        pools[rows].lora_B.data.copy_(torch.from_numpy(lora_B))
    folder = context.run.task(1, "digits")
    folder.path.mkdir(parents=True)
    write_tensors(folder.pool, pool_tensors(pools))
    update = pack_experts(pools)
    eject_experts_(context.clip.model)
    update.write(folder.factors)
    train_tasks(context)  # measures and records what a trained run has; there is nothing left to learn
    return context


def fresh(context: RunContext) -> RunContext:
    """The same run as a new process finds it: the base model is loaded again."""
    return RunContext(context.run, context.recipe, context.device, context.progress)


def read_lora(work: Path) -> dict[Rows, tuple[np.ndarray, np.ndarray]]:
    """PEFT's adapter by open_clip's rows: A (r, in) and B (out, r)."""
    tensors, found = load_file(work / "adapter" / "adapter_model.safetensors"), {}
    for name, lora_A in tensors.items():
        if ".lora_A." in name:
            lora_B = tensors[name.replace("lora_A", "lora_B")]
            module = name.removeprefix("base_model.model.").split(".lora_A.")[0]
            found[Rows(*rows_of(module, len(lora_B)))] = (lora_A, lora_B)
    return found


def faults(work: Path, folder: Path, sound: RunFolder) -> dict[str, Fault]:
    """`r1export verify` on a run whose every merge scales twice, and on one with a weight negated in its release."""
    found: dict[str, Fault] = {}
    for fault in ("merge", "file"):
        run_folder = RunFolder(folder / f"fault-{fault}")
        shutil.copytree(sound.path, run_folder.path, ignore=shutil.ignore_patterns("report.*", "update.r1u"))
        release = run_folder.release(1, "digits")
        if fault == "merge":
            shutil.rmtree(release)
            made = run("export", str(run_folder.path), code=TWICE + VERIFY)
            assert made["exit_code"] == 0, made["said"]
        else:
            negate(release / "visual.safetensors")
        said = verified(run_folder, TWICE if fault == "merge" else "")
        graphs = {"image_embeds": release / "visual.onnx", "text_embeds": release / "textual.onnx"}
        found[fault] = {**said, "off_by": parity(onnx_embeddings(graphs, read_samples(work)), work)}
        shutil.rmtree(run_folder.path)
    return found


def verified(run_folder: RunFolder, plant: str = "") -> Said:
    """`r1export verify RUN`, and the first reason that its report gives."""
    found = run("verify", str(run_folder.path), code=plant + VERIFY)
    reasons = read_json(run_folder.path / "report.json", "")["reasons"] if found["exit_code"] in (0, 1, 4) else []
    return {"exit_code": found["exit_code"], "said": reasons[0][:300] if reasons else found["said"]}


def negate(weights: Path) -> None:
    """Negate the weight that all contenders get negated, in its place."""
    name = rows_of(FIRST_LINEAR, 1)[0]
    spec = read_layout(weights).by_name[name]
    with open(weights, "r+b") as file:
        file.seek(spec.offset)
        value = np.frombuffer(file.read(spec.nbytes), spec.dtype)
        file.seek(spec.offset)
        file.write((-value).tobytes())


if __name__ == "__main__":
    enter("r1export", build)
