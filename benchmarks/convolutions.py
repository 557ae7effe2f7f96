"""The cost of a convolutional CLIP: export, release, update, latency against other forms, and one training step.

    python benchmarks/convolutions.py export MobileCLIP2-S0      # about two minutes
    python benchmarks/convolutions.py train MobileCLIP2-S0       # PEFT only if it is installed

Random weights at full size, experts in the image tower by the default targets, one thread. A later release is all that
`r1export export` does for it once the model is loaded: merge, golden samples, files and their digests. Forms of the image tower in
onnxruntime, interleaved in random order at batch 1: ours; *plain*, the model as open_clip gives it by torch.onnx.export with its
optimiser; *unmerged*, ours with the low-rank branches that a runtime adapter would run; *int8*, ours quantised. A step is
forward, loss, backward and AdamW on images against 16 constant class embeddings, in time of the processor; PEFT's LoRA of
the same rank is added to the same layers, of the model as it is and of its deployed form.
"""

from __future__ import annotations

import argparse
import copy
import logging
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import nn

from r1export.adapt.clip import ClipModel
from r1export.adapt.deployed_form import deploy_
from r1export.adapt.inject import eject_experts_, inject_experts_
from r1export.adapt.losses import in_batch_loss
from r1export.adapt.pack import pack_experts
from r1export.adapt.pool import Pools
from r1export.adapt.trainer import reset_pools_
from r1export.export.graph import export_graphs
from r1export.export.int8 import calibrate, quantized_graphs
from r1export.export.precision import version_tensors
from r1export.export.towers import VisualTower, float_tensors
from r1export.export.weight_map import WeightMap
from r1export.export.write_release import ReleaseContent, write_release
from r1export.pipeline.context import pool_settings
from r1export.recipe import Pool
from r1export.update.container import write_tensors
from r1export.update.factors import ExpertUpdate
from r1export.update.golden_samples import SAMPLES, GoldenSamples
from r1export.update.release_layout import GRAPHS
from r1export.update.release_manifest import BaseModel, GoldenGate, MergedUpdate
from r1export.verify.graph_digest import graph_digest
from r1export.verify.latency import time_rounds
from r1export.verify.paired_stats import paired_ratio
from r1export.verify.runtimes.runtime import open_session
from r1export.verify.unmerged_graph import add_branches

CONTEXT, CLASSES, BLOCKS = 77, 16, 4
FORMS = ("ours", "plain", "unmerged", "int8")
Step = Callable[[], object]


def build(name: str) -> tuple[ClipModel, tuple[int, int]]:
    """The model with random weights, and statistics as if it had seen images; the size of its images."""
    torch.manual_seed(0)
    model = open_clip.create_model(name, load_weights=False).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    size = model.visual.image_size
    return model, size if isinstance(size, tuple) else (size, size)


def adapted(model: nn.Module) -> Pools:
    """Experts in the image tower, as a recipe sets them by default."""
    pools = inject_experts_(model, pool_settings(Pool(towers=("visual",))))
    reset_pools_(pools, 0, 1)
    return pools


def random_update(model: nn.Module) -> ExpertUpdate:
    """The update of one task with random experts; the model is plain again."""
    generator = torch.Generator().manual_seed(0)
    pools = adapted(model)
    for pool in pools.values():
        pool.lora_B.data.normal_(0, 1e-3, generator=generator)
    update = pack_experts(pools)
    eject_experts_(model)
    return update


def write_weights(folder: Path, weights: WeightMap, values: dict[str, np.ndarray]) -> None:
    for file in weights.files:
        write_tensors(folder / file, weights.stored(file, values))


@contextmanager
def timed(what: str) -> Iterator[None]:
    started, processor = time.perf_counter(), time.process_time()
    yield
    spent, passed = time.process_time() - processor, time.perf_counter() - started
    print(f"{what}: {spent:.1f} s of the processor, {passed:.1f} s on the clock", flush=True)


def bench_export(name: str, forms: tuple[str, ...], rounds: int) -> None:
    model, size = build(name)
    plain = copy.deepcopy(model)
    folders = {form: Path(tempfile.mkdtemp()) for form in FORMS}
    with timed(f"{name}: deployed form"):
        deploy_(model.visual, size)
    update = random_update(model)
    base = {n: tensor.detach().numpy().copy() for n, tensor in float_tensors(model).items()}
    with timed("first export with its weights"):
        weights = export_graphs(model, size, CONTEXT, folders["ours"], opset=20)
        write_weights(folders["ours"], weights, base)
    pixels = np.random.default_rng(0).standard_normal((16, 3, *size)).astype(np.float32)
    tokens = np.random.default_rng(0).integers(1, 49000, (16, CONTEXT))
    golden = _golden(model, pixels[:SAMPLES], tokens[:SAMPLES])
    with timed("a later release"):
        _write_later(model, update, base, golden, folders["ours"])
    total = sum(value.nbytes for value in base.values())
    share = 100 * update.nbytes / total
    print(f"update: {len(update.factors)} layers, {update.nbytes} bytes, {share:.2f} % of {total}", flush=True)
    if "plain" in forms:
        _write_plain(plain, torch.from_numpy(pixels[:2]), folders["plain"])
    if "unmerged" in forms:
        write_weights(folders["unmerged"], weights, base)
        add_branches(folders["ours"] / "visual.onnx", update, folders["unmerged"] / "visual.onnx")
    if "int8" in forms:
        _write_int8(folders, base, pixels, tokens)
    _print_latency({form: folders[form] for form in forms}, pixels[:1], rounds)


@torch.no_grad()
def _golden(model: ClipModel, pixels: np.ndarray, tokens: np.ndarray) -> GoldenSamples:
    images = model.encode_image(torch.from_numpy(pixels), normalize=True)
    return GoldenSamples(
        pixels, images.numpy(), tokens, model.encode_text(torch.from_numpy(tokens), normalize=True).numpy()
    )


def _write_later(
    model: ClipModel, update: ExpertUpdate, base: dict[str, np.ndarray], golden: GoldenSamples, graphs: Path
) -> None:
    """A release with `update`, whose texts are those of the base, as experts of the image tower leave them."""
    merged = base | update.apply(base)
    for parameter, tensor in float_tensors(model).items():
        tensor.data.copy_(torch.from_numpy(merged[parameter]))
    with torch.no_grad():
        images = model.encode_image(torch.from_numpy(golden.pixel_values), normalize=True).numpy()
    content = ReleaseContent(
        name="01-task", sequence=1, precision="fp32", base=BaseModel("base", "0" * 64), updates=(MergedUpdate("task", "0" * 64),),
        weights=merged, tasks=(), golden=replace(golden, image_embeds=images), preprocess={}, tokenizer=open_clip.SimpleTokenizer(),
        graph_digests={graph: graph_digest(graphs / graph) for graph in GRAPHS}, accuracy=lambda _: {}, versions={},
        tolerance=GoldenGate(5e-6, 0.9999), adapted=tuple(update.factors),
    )  # fmt: skip
    write_release(content, graphs, Path(tempfile.mkdtemp()) / content.name)


def _write_plain(model: nn.Module, example: torch.Tensor, folder: Path) -> None:
    """The image tower as torch.onnx gives it."""
    program = torch.onnx.export(
        VisualTower(model).eval(), (example,), dynamo=True, opset_version=20, verbose=False,
        input_names=["pixel_values"], dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    assert program is not None  # as there is with dynamo
    program.save(folder / "visual.onnx", external_data=True)


def _write_int8(folders: dict[str, Path], base: dict[str, np.ndarray], pixels: np.ndarray, tokens: np.ndarray) -> None:
    ranges = calibrate(folders["ours"], {"pixel_values": pixels, "input_ids": tokens})
    quantized = quantized_graphs(folders["ours"], folders["int8"])
    write_weights(folders["int8"], quantized, version_tensors(base, [], quantized, ranges))
    sizes = {form: (folders[form] / "visual.safetensors").stat().st_size for form in ("ours", "int8")}
    print(f"image tower: {sizes['ours']} bytes, int8 {sizes['int8']} ({sizes['int8'] / sizes['ours']:.3f})", flush=True)


def _print_latency(folders: dict[str, Path], image: np.ndarray, rounds: int) -> None:
    rng = np.random.default_rng(0)
    seconds: dict[str, list[np.ndarray]] = {form: [] for form in folders}
    for _ in range(BLOCKS):  # sessions opened anew lie elsewhere in memory
        steps = {form: _runner(folder, image) for form, folder in folders.items()}
        for form, times in time_rounds(steps, rounds, rng, time.process_time).items():
            seconds[form].append(times)
    for form in folders:
        ratio = paired_ratio(np.array(seconds["ours"]), np.array(seconds[form]))
        print(
            f"{form}: {1000 * np.median(seconds[form]):.1f} ms of the processor; ours takes {ratio.ratio:.3f} of it "
            f"[{ratio.ci95[0]:.3f}, {ratio.ci95[1]:.3f}]"
        )


def _runner(folder: Path, image: np.ndarray) -> Step:
    session = open_session(folder / "visual.onnx", threads=1)
    return lambda: session.run(None, {"pixel_values": image})


def ours(name: str, batch: int) -> Step:
    model, size = build(name)
    deploy_(model.visual, size)
    pools = adapted(model)
    for pool in pools.values():
        pool.train()
    return _step(model, size, batch, [parameter for pool in pools.values() for parameter in pool.parameters()])


def peft(name: str, batch: int, *, deployed: bool) -> Step:
    from peft import LoraConfig, get_peft_model

    model, size = build(name)
    reference = copy.deepcopy(model)
    deploy_(reference.visual, size)
    layers = sorted({rows.parameter.removesuffix(".weight") for rows in adapted(reference)})
    if deployed:
        deploy_(model.visual, size)
    defaults = Pool()
    lora = LoraConfig(r=defaults.rank, lora_alpha=1, lora_dropout=defaults.dropout, target_modules=layers)
    get_peft_model(model, lora)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for module_name, module in model.named_modules():
        if module_name.endswith("lora_dropout"):
            module.train()
    return _step(model, size, batch, learned)


def _step(model: ClipModel, size: tuple[int, int], batch: int, learned: list[nn.Parameter]) -> Step:
    generator = torch.Generator().manual_seed(0)
    pixels, labels = torch.randn(batch, 3, *size, generator=generator), torch.arange(batch) % CLASSES
    optimizer = torch.optim.AdamW(learned, lr=2e-3)
    with torch.no_grad():
        width = model.encode_image(pixels[:1]).shape[1]
    classes = F.normalize(torch.randn(CLASSES, width, generator=generator), dim=-1)

    def step() -> None:
        loss = in_batch_loss(100 * model.encode_image(pixels, normalize=True) @ classes.T, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


CONTENDERS: dict[str, Callable[[str, int], Step]] = {
    "ours": ours,
    "peft": partial(peft, deployed=False),
    "peft, deployed form": partial(peft, deployed=True),
}


def peak_memory(contender: str, name: str, batch: int) -> float:
    """Peak RSS in GB of two steps in a process of its own.

    Asked for before this process holds a model: Linux lets a child start with the peak of the process that makes it.
    """
    command = [sys.executable, __file__, "train", name, "--batch", str(batch), "--alone", contender]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def bench_train(name: str, rounds: int, batch: int) -> None:
    peaks = {contender: peak_memory(contender, name, batch) for contender in CONTENDERS}
    print(f"peak memory in GB: {peaks}", flush=True)
    steps = {contender: make(name, batch) for contender, make in CONTENDERS.items()}
    seconds = time_rounds(steps, rounds, np.random.default_rng(0), time.process_time)
    for contender in steps:
        ratio = paired_ratio(seconds["ours"][:, None], seconds[contender][:, None])
        print(
            f"{contender}: {np.median(seconds[contender]):.2f} s, peak {peaks[contender]:.2f} GB; ours takes {ratio.ratio:.3f} of its time "
            f"[{ratio.ci95[0]:.3f}, {ratio.ci95[1]:.3f}], {rounds} rounds"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("export", "train"))
    parser.add_argument("name", nargs="?", default="MobileCLIP2-S0")
    parser.add_argument("--rounds", type=int, default=5, help="of steps, or of runs in each of four blocks")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="whose latency is measured")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--alone", choices=CONTENDERS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if asked.alone:
        step = CONTENDERS[asked.alone](asked.name, asked.batch)
        step()
        step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    elif asked.what == "export":
        bench_export(asked.name, tuple(asked.forms), asked.rounds)
    else:
        bench_train(asked.name, asked.rounds, asked.batch)


if __name__ == "__main__":
    main()
