"""Cost of one training step: our pools, the plain variant, PEFT's LoRA and the arithmetic floor, in one run.

    python benchmarks/train.py --out train.json            # PEFT and transformers only if they are installed

ViT-B/32 with random weights, batch 32, both towers, experts in all 144 linears of the blocks. Contenders:

    ours    one low-rank product per linear, each class of the batch encoded once, up to the end of the longest text;
            the published losses
    fixed   the same once the selection of experts is fixed: no dropout, no votes; 70 % of a task's steps by default
    distill ours with train.distill_weight: reference texts are encoded too
    whole   ours with texts of 77 tokens
    plain   the dense product B diag(g) A per linear, a text encoded for every image: what the formulas say literally
    peft    LoRA of rank 12 by PEFT in the same 144 linears of transformers' CLIP, classes encoded once and
            filled up to the longest only, as in ours
    base    the model without experts, forward and backward down to the first linear that would have some
    floor   the FLOPs of base over the rate that a large matrix product reaches in the same rounds

Steps are interleaved in random order; peak memory is measured with each contender in a process of its own. `--processor` counts
processor time, for a machine that has other work to do: set OMP_NUM_THREADS=1 with it.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r1export.adapt.class_token import class_token_only
from r1export.adapt.clip import ClipModel
from r1export.adapt.distillation import REFERENCES
from r1export.adapt.inject import inject_experts_
from r1export.adapt.losses import in_batch_loss
from r1export.adapt.pool import ExpertPool
from r1export.adapt.routing import Batch
from r1export.adapt.text_truncation import short_texts
from r1export.adapt.trainer import reset_pools_
from r1export.pipeline.context import pool_settings
from r1export.recipe import Pool
from r1export.verify.latency import time_rounds
from r1export.verify.paired_stats import paired_ratio

RANK = 12
END = 10  # the position at which a prompt of a few words ends
Step = Callable[[], None]


class PlainPool(ExpertPool):
    """The same function, with the dense product of the factors, as it is often written. In eval mode, as pools are computed together in training."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.settings.dropout)
        gate = self.gate(self.token(x), Batch()) * self.settings.scaling
        return F.linear(x, self.lora_B @ torch.diag(gate) @ self.lora_A)


def inputs(batch: int, classes: int, references: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images (batch, 3, 224, 224), one prompt per class and reference (classes + references, 77), the label of each image."""
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 49000, (classes + references, 77), generator=rng)
    tokens[:, END] = 49407
    return torch.randn(batch, 3, 224, 224, generator=rng), tokens, torch.arange(batch) % classes


def clip_step(
    model: ClipModel,
    parameters: list[nn.Parameter],
    batch: int,
    classes: int,
    *,
    plain: bool,
    whole: bool,
    references: int,
) -> Step:
    pixels, tokens, labels = inputs(batch, classes, references)
    known = torch.randn(batch, references).softmax(1) if references else None
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)

    def step() -> None:
        with nullcontext() if plain else class_token_only(model):
            image = model.encode_image(pixels, normalize=True)
        with nullcontext() if plain or whole else short_texts(model):
            text = model.encode_text(tokens[labels] if plain else tokens, normalize=True)
        loss = in_batch_loss(100 * image @ text[:classes].T, labels)
        if known is not None:
            found = (100 * image @ text[classes:].T).log_softmax(1)
            loss = loss + 0.2 * F.kl_div(found, known, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def ours(
    batch: int, classes: int, *, plain: bool = False, fixed: bool = False, whole: bool = False, references: int = 0
) -> Step:
    import open_clip

    model = open_clip.create_model("ViT-B-32", load_weights=False).requires_grad_(False)
    pools = inject_experts_(model, pool_settings(Pool()))
    reset_pools_(pools, 0, 1)
    model.train()
    for pool in pools.values():
        if plain:
            pool.__class__ = PlainPool
            pool.eval()
        if fixed:
            pool.freeze_()
    parameters = [parameter for pool in pools.values() for parameter in pool.parameters()]
    assert len(pools) == 144
    return clip_step(model, parameters, batch, classes, plain=plain, whole=whole, references=references)


def peft(batch: int, classes: int) -> Step:
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    text, vision = CLIPTextConfig().to_dict(), CLIPVisionConfig(patch_size=32).to_dict()
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=512)
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    lora = LoraConfig(r=RANK, lora_alpha=1, lora_dropout=0.2, target_modules=targets)
    model = get_peft_model(CLIPModel(config), lora)
    assert sum(name.endswith("lora_A.default") for name, _ in model.named_modules()) == 144
    pixels, tokens, labels = inputs(batch, classes)
    tokens = tokens[:, : END + 1]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    model.train()

    def step() -> None:
        image = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        text = F.normalize(model.get_text_features(input_ids=tokens).pooler_output, dim=-1)
        loss = in_batch_loss(100 * image @ text.T, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


CONTENDERS: dict[str, Callable[[int, int], Step]] = {
    "ours": ours,
    "fixed": partial(ours, fixed=True),
    "distill": partial(ours, references=REFERENCES),
    "whole": partial(ours, whole=True),
    "plain": partial(ours, plain=True),
    "peft": peft,
}


def base(batch: int, classes: int) -> Step:
    """One forward and backward pass of the model alone; only biases of the first block of each tower require a gradient."""
    import open_clip

    model = open_clip.create_model("ViT-B-32", load_weights=False).requires_grad_(False).train()
    biases = [tower.resblocks[0].attn.in_proj_bias for tower in (model.visual.transformer, model.transformer)]
    for bias in biases:
        bias.requires_grad_()
    pixels, tokens, labels = inputs(batch, classes)

    def step() -> None:
        with short_texts(model):
            image, text = model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)
        torch.autograd.grad(in_batch_loss(100 * image @ text.T, labels), biases)

    return step


def gigaflops(step: Step) -> float:
    """Of the products of one step, in GFLOP. In training mode: the fused attention of evaluation is unknown to the counter."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops()) / 1e9


PRODUCT = 2 * 1600 * 768 * 3072 * 20 / 1e9  # GFLOP of `product`


def product() -> Step:
    """Twenty large matrix products."""
    a, b = torch.randn(1600, 768), torch.randn(768, 3072)
    out = torch.empty(1600, 3072)

    def step() -> None:
        for _ in range(20):
            torch.mm(a, b, out=out)

    return step


def peak_memory(name: str, batch: int, classes: int) -> float:
    """Peak RSS in GB of two steps in a process of its own."""
    command = [sys.executable, __file__, "--alone", name, "--batch", str(batch), "--classes", str(classes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--classes", type=int, default=16, help="classes in a batch")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--processor", action="store_true", help="processor time instead of wall clock, no peak memory")
    parser.add_argument("--only", nargs="*", help="contenders to run; ours is always needed")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--alone", choices=CONTENDERS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    if asked.alone:
        step = CONTENDERS[asked.alone](asked.batch, asked.classes)
        step()
        step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        return
    names = ["ours", "fixed", "distill", "whole", "plain"]
    try:
        import peft  # noqa: F401

        names.append("peft")
    except ImportError:
        print("PEFT is absent: pip install peft transformers to compare with it\n")
    names = [name for name in names if name in asked.only] if asked.only else names
    memory = {} if asked.processor else {name: peak_memory(name, asked.batch, asked.classes) for name in names}
    steps = {name: CONTENDERS[name](asked.batch, asked.classes) for name in names}
    alone = base(asked.batch, asked.classes)
    flops = gigaflops(alone)
    steps |= {"base": alone, "floor": product()}
    clock = time.process_time if asked.processor else time.perf_counter
    seconds = time_rounds(steps, asked.rounds, np.random.default_rng(0), clock)
    rate = PRODUCT / float(np.median(seconds["floor"]))
    seconds["floor"] *= flops / PRODUCT
    print(
        f"One step, ViT-B/32, batch {asked.batch}, {asked.classes} classes; floor: {flops:.0f} GFLOP at {rate:.0f} GFLOP/s\n"
    )
    print(
        "| contender | seconds | its time / ours | 95 % | its time / floor | 95 % | peak GB |\n|---|---|---|---|---|---|---|"
    )
    rows = {}
    for name in steps:
        to_ours, to_floor = (
            paired_ratio(seconds[name][:, None], seconds[other][:, None]) for other in ("ours", "floor")
        )
        rows[name] = {
            "seconds": float(np.median(seconds[name])), "n": len(seconds[name]), "peak_gb": memory.get(name),
            "to_ours": to_ours.ratio, "to_ours_ci95": to_ours.ci95, "to_floor": to_floor.ratio, "to_floor_ci95": to_floor.ci95,
        }  # fmt: skip
        shares = " | ".join(f"{r.ratio:.2f} | {r.ci95[0]:.2f} to {r.ci95[1]:.2f}" for r in (to_ours, to_floor))
        print(f"| {name} | {rows[name]['seconds']:.2f} | {shares} | {memory.get(name, float('nan')):.2f} |")
    if asked.out:
        versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        least = {"gflop": flops, "gflop_per_s": rate}
        asked.out.write_text(
            json.dumps({"rows": rows, "floor": least, "versions": versions}, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
