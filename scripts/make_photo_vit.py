"""Make `builtin:photo-vit`: a vision transformer with a class token, distilled from `builtin:photo` without labels.

    python scripts/make_photo_vit.py --packs SMALL.npz LARGE.npz --maps MAPS.npy --out FOLDER --test TEST.npz

For maintainers; under an hour on one core. The feature maps of EfficientNet-Lite0 (4 x 4 of 320 channels) become the tokens of four
transformer blocks, which learn to give the image embeddings of `builtin:photo`. What they replace, its head, is a mean over
positions of a function of each: so the maps of two views can be mixed at will, and the head still says what to learn.

Maps are computed once, of random parts of the training pictures of `--packs`, alone and in mosaics of pictures of 64 pixels.
The weights hold the transformer only: `builtin:photo` has the rest (r1export/adapt/photo_vit.py).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from make_photo_base import CONFIG as PHOTO_CONFIG
from make_photo_base import print_zero_shot
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from r1export.adapt.clip import Clip, load_clip
from r1export.adapt.evaluate import class_embeddings
from r1export.adapt.model_config import read_model_config
from r1export.adapt.photo_vit import BACKBONE, EXTENDS, NAME
from r1export.adapt.preprocess_settings import OPENAI
from r1export.data.npz import read_pack
from r1export.data.synthetic import BUILTIN_MODELS
from r1export.data.task import DEFAULT_TEMPLATES, ImageSet, Picture, Task

T = TypeVar("T")

FILE = "photo-vit-128"
CONFIG = PHOTO_CONFIG | {"vision_cfg": PHOTO_CONFIG["vision_cfg"] | {"timm_model_name": NAME, "timm_pool": "token"}}
TILE = 64  # pixels a side of the pieces of a mosaic
SHOWN = (0.15, 1.0)  # share of a picture or a mosaic that a view shows
CACHED = 64  # views computed at a time
WARMUP = 200  # steps


class Views:
    """Views of pictures at the size that the tower sees: a random part of one picture, or of four small ones side by side.

    Small pictures alone would be enlarged twice and blurred; in a mosaic they keep the sharpness of photographs.
    """

    def __init__(self, clip: Clip, files: Sequence[Path], seed: int) -> None:
        self.preprocess, self.random = clip.preprocess, np.random.default_rng(seed)
        self.packs = [_pictures(file) for file in files]
        self.small = [picture for pack in self.packs for picture in pack if picture.shape[:2] == (TILE, TILE)]

    def batch(self, size: int) -> Tensor:
        """uint8 (size, 3, height, width)."""
        return torch.from_numpy(np.stack([self._view() for _ in range(size)]))

    def _view(self) -> np.ndarray:
        canvas = self._mosaic() if self.random.random() < 0.5 else self._one(self._one(self.packs))
        height, width = canvas.shape[:2]
        share, aspect = self.random.uniform(*SHOWN), math.exp(self.random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w = min(width, round(width * math.sqrt(share * aspect)))
        h = min(height, round(height * math.sqrt(share / aspect)))
        left, top = self.random.integers(width - w + 1), self.random.integers(height - h + 1)
        view = self.preprocess.resized(Image.fromarray(canvas), (left, top, left + w, top + h))
        return view[:, :, ::-1] if self.random.random() < 0.5 else view

    def _one(self, several: Sequence[T]) -> T:
        return several[int(self.random.integers(len(several)))]

    def _mosaic(self) -> np.ndarray:
        a, b, c, d = (self._one(self.small) for _ in range(4))
        return np.concatenate([np.concatenate([a, b], 1), np.concatenate([c, d], 1)])


def _pictures(file: Path) -> list[np.ndarray]:
    """The training pictures of a pack: uint8 (height, width, 3) each."""
    images = read_pack(file).train
    return [np.asarray(images.read(i)) for i in range(len(images))]


class Teacher:
    """`builtin:photo` in two parts: the stem, whose feature maps the transformer reads, and the head that it replaces."""

    def __init__(self, clip: Clip) -> None:
        self.clip, trunk = clip, clip.model.visual.trunk
        self.stem = nn.Sequential(trunk.conv_stem, trunk.bn1, trunk.blocks)
        self.head = nn.Sequential(trunk.conv_head, trunk.bn2, trunk.global_pool, clip.model.visual.head)
        self.classes = clip.model.logit_scale.exp() * torch.from_numpy(class_embeddings(clip, _imagenet()))

    @torch.inference_mode()
    def maps(self, pixels: Tensor) -> Tensor:
        """uint8 (n, 3, height, width) -> (n, channels, rows, columns)."""
        maps: Tensor = self.stem(self.clip.preprocess.normalize(pixels).contiguous(memory_format=torch.channels_last))
        return maps

    @torch.no_grad()
    def embeddings(self, maps: Tensor) -> Tensor:
        """Unit-norm (n, D)."""
        return F.normalize(self.head(maps).float(), dim=-1)


def _imagenet() -> Task:
    """ImageNet's names, without a picture."""
    none = ImageSet(np.empty(0, np.int64), lambda _: Picture(Image.new("RGB", (1, 1))))
    return Task("imagenet", tuple(open_clip.IMAGENET_CLASSNAMES), DEFAULT_TEMPLATES, none, none)


def cache_maps(teacher: Teacher, views: Views, count: int, file: Path) -> None:
    """Write the feature maps of `count` views: fp16 (count, rows, columns, channels)."""
    _, channels, rows, columns = teacher.maps(torch.zeros(1, 3, *views.preprocess.size, dtype=torch.uint8)).shape
    cache = np.lib.format.open_memmap(file, "w+", np.float16, (count, rows, columns, channels))
    start = time.time()
    for i in range(0, count, CACHED):
        maps = teacher.maps(views.batch(min(CACHED, count - i)))
        cache[i : i + CACHED] = maps.permute(0, 2, 3, 1).half().numpy()
        if i // CACHED % 100 == 0:
            print(f"view {i} seconds {time.time() - start:.0f}", flush=True)
    cache.flush()


def batches(file: Path, size: int, seed: int) -> Iterator[Tensor]:
    """Random feature maps (size, channels, rows, columns) without end, those of half of the batches mixed of two views by position."""
    cache, random = np.load(file, mmap_mode="r"), np.random.default_rng(seed)
    while True:
        chosen = np.sort(random.integers(len(cache), size=size))
        maps = torch.from_numpy(cache[chosen].astype(np.float32)).permute(0, 3, 1, 2)
        if random.random() < 0.5:
            share = torch.rand(size, 1, 1, 1)
            maps = torch.where(torch.rand(size, 1, *maps.shape[2:]) < share, maps, maps.roll(size // 2, 0))
        yield maps


def loss_of(embeddings: Tensor, targets: Tensor, classes: Tensor) -> Tensor:
    """Ten times 1 - cosine, and the Kullback-Leibler divergence of what ImageNet's classes (C, D), times the logit scale, make of both (n, D)."""
    answers, wanted = ((each @ classes.T).log_softmax(1) for each in (embeddings, targets))
    divergence = F.kl_div(answers, wanted, log_target=True, reduction="batchmean")
    return 10 * (1 - (embeddings * targets).sum(1).mean()) + divergence


def distill_(tower: nn.Module, teacher: Teacher, maps: Iterator[Tensor], steps: int, lr: float) -> None:
    """Train an image tower that reads feature maps, in place: AdamW, cosine schedule, products in bf16."""
    matrices, others = ([p for p in tower.parameters() if (p.ndim >= 2) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.02}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    start = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        batch = next(maps)
        # Flash attention is slow for short sequences on a CPU: with it a step takes twice the time.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            targets, embeddings = teacher.embeddings(batch), tower(batch)
        loss = loss_of(F.normalize(embeddings.float(), dim=-1), targets, teacher.classes)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step} loss {loss.item():.3f} seconds {time.time() - start:.0f}", flush=True)


def new_tower(config: Path) -> nn.Module:
    """The untrained image tower of CONFIG, whose file it writes, without its stem: it reads feature maps."""
    config.write_text(json.dumps(CONFIG, indent=4) + "\n")
    tower: nn.Module = read_model_config(config).build().visual
    tower.set_submodule(BACKBONE.removeprefix("visual.").rstrip("."), nn.Identity())
    return tower.train()


def write_transformer(tower: nn.Module, file: Path) -> None:
    """In fp16, with the name of the file that has the rest."""
    state = {f"visual.{name}": value.half().contiguous() for name, value in tower.state_dict().items()}
    save_file(state, file, metadata={EXTENDS: BUILTIN_MODELS["photo"].weights.name})
    print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=Path, nargs="+", required=True, help="packs of pictures to learn from")
    parser.add_argument("--maps", type=Path, required=True, help="file of feature maps, computed if it is not there")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and the config")
    parser.add_argument("--test", type=Path, nargs="*", default=[], help="packs to report zero-shot accuracy on")
    parser.add_argument("--views", type=int, default=70_400)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    photo = BUILTIN_MODELS["photo"]
    clip = load_clip(weights=photo.weights, config=photo.config, preprocess=OPENAI)
    teacher = Teacher(clip)
    if not options.maps.exists():
        cache_maps(teacher, Views(clip, options.packs, options.seed), options.views, options.maps)
    options.out.mkdir(parents=True, exist_ok=True)
    weights, config = (options.out / f"{FILE}{suffix}" for suffix in (".safetensors", ".json"))
    tower = new_tower(config)
    distill_(tower, teacher, batches(options.maps, options.batch, options.seed), options.steps, options.lr)
    write_transformer(tower, weights)
    if not (options.out / photo.weights.name).exists():
        shutil.copy(photo.weights, options.out)  # the rest is read from the same folder
    print_zero_shot(load_clip(weights=weights, config=config, preprocess=OPENAI), options.test)


if __name__ == "__main__":
    main()
