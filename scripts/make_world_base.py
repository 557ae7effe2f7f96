"""Pre-train the packaged base model on the drawn world and print what it can do. For maintainers; minutes on two cores.

    python scripts/make_world_base.py --out FOLDER

Every image is drawn once and never seen again. Each attribute of an image (colour, shape, colour and shape, size, style,
background) is a question: which of the possible captions is true? The pairs in UNSEEN_PAIRS are never drawn or named,
and nothing of the other builtin tasks is. Same seed, machine and thread count: same weights.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
import time
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from torch import Tensor, nn

from r1export.adapt.clip import ClipModel
from r1export.data.synthetic import (
    BUILTIN_MODELS,
    COLOURS,
    FACING,
    PAIRS,
    SHAPES,
    SIZE,
    UNSEEN_PAIRS,
    Scene,
    draw_scene,
    image_rng,
    load_builtin,
    noisy,
    two_colours,
)
from r1export.data.task import ImageSet, Task

SEEN_PAIRS = [pair for pair in PAIRS if pair not in UNSEEN_PAIRS]
TEMPLATES = [
    "a {}.",
    "{}",
    "the {}.",
    "a picture of a {}.",
    "an image of the {}.",
    "a drawing of a {}.",
    "a photo of one {}.",
    "this is a {}.",
]
# Question -> its possible answers, as phrases for the templates. Combined answers teach the text tower to compose.
QUESTIONS = {
    "pair": [f"{colour} {shape}" for colour, shape in SEEN_PAIRS],
    "colour": [f"{colour} shape" for colour in COLOURS],
    "shape": list(SHAPES),
    "size, colour": [f"{size} {colour} shape" for size in ("small", "large") for colour in COLOURS],
    "style, shape": [f"{style} {shape}" for style in ("solid", "outlined") for shape in SHAPES],
    "background": ["shape on a dark background", "shape on a light background"],
    "facing": [f"shape facing {way}" for way in FACING],
    "letter": [f"letter {letter}" for letter in ascii_lowercase],
}
WEIGHTS = {
    "pair": 1.0,
    "colour": 0.5,
    "shape": 0.5,
    "size, colour": 0.3,
    "style, shape": 0.3,
    "background": 0.1,
    "facing": 0.7,
    "letter": 0.7,
}
PHRASES = [phrase for answers in QUESTIONS.values() for phrase in answers]
FONTS = [
    ImageFont.load_default(size) for size in range(50, 120, 10)
]  # the one font inside Pillow, in pixels before averaging down


def truths_of(scene: Scene) -> dict[str, str]:
    """The true answer to each question that the scene can answer."""
    truths = {"pair": f"{scene.colour} {scene.shape}", "colour": f"{scene.colour} shape", "shape": scene.shape}
    truths |= {"size, colour": f"{scene.size} {scene.colour} shape", "style, shape": f"{scene.style} {scene.shape}"}
    truths |= {"background": f"shape on a {scene.background} background"}
    return truths | ({"facing": f"shape facing {scene.facing}"} if scene.facing else {})


def draw_letter(letter: str, rng: np.random.Generator) -> Image.Image:
    """A printed letter, capital or not, in two random colours; half of them in a low resolution. Strokes, for tasks with strokes."""
    ink, paper = two_colours(rng)
    u = rng.random(8)
    image = Image.new("L", (3 * SIZE, 3 * SIZE))
    letter = letter.upper() if u[0] < 0.5 else letter
    middle = tuple(48 + 20 * (u[1:3] - 0.5))
    ImageDraw.Draw(image).text(
        middle, letter, fill=255, font=FONTS[int(u[3] * len(FONTS))], anchor="mm", stroke_width=int(4 * u[4])
    )
    image = image.rotate(40 * (u[5] - 0.5), Image.Resampling.BILINEAR).reduce(
        12 if u[6] < 0.25 else 6 if u[6] < 0.5 else 3
    )
    cover = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))[..., None] / 255
    return noisy(paper + cover * (ink - paper), rng)


def draw_example(index: int) -> tuple[Image.Image, dict[str, str]]:
    """Pre-training image `index` and what is true of it: a letter every third time, else a scene."""
    rng = image_rng("world", "pretrain", index)
    if index % 3 == 0:
        letter = ascii_lowercase[index // 3 % 26]
        return draw_letter(letter, rng), {"letter": f"letter {letter}"}
    image, scene = draw_scene(*SEEN_PAIRS[index * 2 // 3 % len(SEEN_PAIRS)], rng)
    return image, truths_of(scene)


def normalise(pixels: np.ndarray) -> Tensor:
    """uint8 (n, s, s, 3) -> float (n, 3, s, s) as CLIP reads it."""
    x = torch.from_numpy(pixels).float().div_(255)
    return ((x - torch.tensor(open_clip.OPENAI_DATASET_MEAN)) / torch.tensor(open_clip.OPENAI_DATASET_STD)).permute(
        0, 3, 1, 2
    )


def draw_batch(step: int, batch: int) -> tuple[Tensor, Tensor]:
    """Images (batch, 3, s, s) and answers (batch, questions) of one step; -1 where a question does not apply."""
    images, truths = zip(*map(draw_example, range(step * batch, (step + 1) * batch)), strict=True)
    answers = [[a.index(truth[q]) if q in truth else -1 for q, a in QUESTIONS.items()] for truth in truths]
    return normalise(np.stack([np.asarray(image) for image in images])), torch.tensor(answers)


class Texts:
    """Token rows for captions, and for captions of words that mean nothing yet."""

    def __init__(self, tokenizer: open_clip.SimpleTokenizer, seed: int) -> None:
        self.tokenize, self.random = tokenizer, random.Random(seed)
        rows = tokenizer([template.format(phrase) for template in TEMPLATES for phrase in PHRASES])
        self.used = rows.unique()

    def captions(self) -> Tensor:
        """Every phrase in a random template: (phrases, context)."""
        rows: Tensor = self.tokenize([self.random.choice(TEMPLATES).format(phrase) for phrase in PHRASES])
        return rows

    def nonsense(self, count: int) -> Tensor:
        """`count` random one- or two-token phrases, each in two templates: (2 * count, context)."""
        words = [self.random.choices(range(1000, 49000), k=self.random.choice((1, 2))) for _ in range(count)]
        return torch.cat([self._fill(self.random.choice(TEMPLATES), word) for _ in range(2) for word in words])

    def _fill(self, template: str, word: list[int]) -> Tensor:
        before, after = (self.tokenize.encode(part.strip()) for part in template.split("{}"))
        row = [self.tokenize.sot_token_id, *before, *word, *after, self.tokenize.eot_token_id]
        return torch.tensor([row + [0] * (self.tokenize.context_length - len(row))])


def new_model(seed: int) -> tuple[ClipModel, open_clip.SimpleTokenizer]:
    """The untrained model. Token rows are random signs: words that no caption uses stay distinct, and git can compress them."""
    torch.manual_seed(seed)
    config = BUILTIN_MODELS["world"].config
    open_clip.add_model_config(config)
    model = open_clip.create_model(config.stem)
    model.token_embedding.weight.data.sign_().mul_(0.02)
    return model, open_clip.get_tokenizer(config.stem)


def question_loss(logits: Tensor, answers: Tensor) -> Tensor:
    """Weighted cross-entropy over the questions. logits (batch, phrases), answers (batch, questions)."""
    parts = logits.split([len(a) for a in QUESTIONS.values()], dim=1)
    losses = [
        w * F.cross_entropy(part, answers[:, k], ignore_index=-1)
        for k, (part, w) in enumerate(zip(parts, WEIGHTS.values(), strict=True))
    ]
    return torch.stack(losses).sum()


def nonsense_loss(model: ClipModel, rows: Tensor) -> Tensor:
    """Two templates of one new word are alike and unlike those of other words: prompts of later tasks start out distinct."""
    one, two = F.normalize(model.encode_text(rows), dim=-1).chunk(2)
    return F.cross_entropy(20 * one @ two.T, torch.arange(len(one)))


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """Weight decay on matrices only, never on token rows: those no caption uses must keep their values."""
    decay = [p for n, p in model.named_parameters() if p.ndim >= 2 and n != "token_embedding.weight"]
    plain = [p for n, p in model.named_parameters() if p.ndim < 2 or n == "token_embedding.weight"]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def pretrain(model: ClipModel, texts: Texts, steps: int, batch: int, lr: float) -> dict[str, Tensor]:
    """Train in place; returns the moving average of the weights."""
    optimizer = make_optimizer(model, lr)
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    unused = torch.ones(len(model.token_embedding.weight), 1).index_fill_(0, texts.used, 0).bool()
    start = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        images, answers = draw_batch(step, batch)
        text = F.normalize(model.encode_text(texts.captions()), dim=-1)
        logits = model.logit_scale.exp() * F.normalize(model.encode_image(images), dim=-1) @ text.T
        loss = question_loss(logits, answers) + 0.1 * nonsense_loss(model, texts.nonsense(32))
        optimizer.zero_grad()
        loss.backward()
        model.token_embedding.weight.grad.masked_fill_(unused, 0)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(50))
            for name, value in model.state_dict().items():
                average[name].lerp_(value, 1 - min(0.995, step / (step + 50)))
        if step % 100 == 0:
            print(f"step {step} loss {loss.item():.3f} seconds {time.time() - start:.0f}", flush=True)
    return average


@torch.no_grad()
def accuracy(model: ClipModel, tokenize: open_clip.SimpleTokenizer, task: Task, images: ImageSet) -> float:
    """Zero-shot top-1 of `images` among all classes of the task, in per cent."""
    text = F.normalize(model.encode_text(tokenize([task.templates[0].format(name) for name in task.classes])), dim=-1)
    pixels = np.stack([np.asarray(images.read(i)) for i in range(len(images))])
    chosen = (model.encode_image(normalise(pixels)) @ text.T).argmax(1)
    return 100 * float((chosen.numpy() == images.labels).mean())


def print_table(model: ClipModel, tokenize: open_clip.SimpleTokenizer) -> None:
    """Held-out accuracies and the chance level."""
    world = load_builtin("world")
    unseen = np.isin(world.train.labels, [PAIRS.index(pair) for pair in UNSEEN_PAIRS])
    rows = [("world, unseen pairs", world, world.train.subset(np.flatnonzero(unseen)))]
    rows += [
        (name, task, task.test) for name in ("world", "patterns", "arrows", "digits") for task in [load_builtin(name)]
    ]
    print(f"{'held-out images':24}{'n':>6}{'top-1':>8}{'chance':>8}")
    for name, task, images in rows:
        print(f"{name:24}{len(images):6}{accuracy(model, tokenize, task, images):8.1f}{100 / len(task.classes):8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and the config")
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = new_model(options.seed)
    average = pretrain(model, Texts(tokenizer, options.seed), options.steps, options.batch, options.lr)
    options.out.mkdir(parents=True, exist_ok=True)
    weights, config = BUILTIN_MODELS["world"]
    half = {name: value.half().contiguous() for name, value in average.items()}
    save_file(half, options.out / weights.name)
    if not (options.out / config.name).exists():
        shutil.copy(config, options.out / config.name)
    model.load_state_dict(half)  # the table is about the rounded weights
    print_table(model.eval(), tokenizer)


if __name__ == "__main__":
    main()
