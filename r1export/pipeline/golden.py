"""The golden samples of a release: which pictures and prompts they are follows from the tasks alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from r1export.pipeline.context import RunContext
from r1export.update.golden_samples import PICTURES, SAMPLES, GoldenSamples

ODD_PROMPTS = (  # what people type: other scripts, signs and capitals, and more than a tower takes
    "ein Foto von einem Käfer auf 花卉 🐞",
    "A PHOTO,  of “two” CATS & 3 dogs!",
    "a very long prompt " * 40,
)


@dataclass(frozen=True)
class GoldenInputs:
    """`pixels`, uint8 (n, 3, H, W), cropped; `tokens` (n, L); the pictures and prompts that they are made of."""

    pixels: Tensor
    tokens: Tensor
    pictures: tuple[np.ndarray, ...]
    prompts: tuple[str, ...]


def golden_inputs(context: RunContext) -> GoldenInputs:
    """Test images of all tasks in turn, prompts of their classes and odd ones."""
    clip, tasks = context.clip, context.tasks
    picks = [(tasks[i % len(tasks)], i // len(tasks)) for i in range(SAMPLES)]
    pictures = tuple(
        _picture(task.test.read(i % len(task.test)), turn) for turn, (task, i) in enumerate(picks[:PICTURES])
    )
    cropped = torch.from_numpy(np.stack([clip.preprocess.crop(Image.fromarray(picture)) for picture in pictures]))
    rest = [context.tests[task.name].batch(np.array([i % len(task.test)])) for task, i in picks[PICTURES:]]
    named = [task.templates[0].format(task.classes[i % len(task.classes)]) for task, i in picks]
    prompts = (*named[: SAMPLES - len(ODD_PROMPTS)], *ODD_PROMPTS)
    return GoldenInputs(torch.cat([cropped, *rest]), clip.tokenize(list(prompts)), pictures, prompts)


@torch.inference_mode()
def golden_texts(context: RunContext, inputs: GoldenInputs) -> np.ndarray:
    """What the text tower of the run makes of the prompts with the updates that are applied to it now: float32 (n, D)."""
    embeds: np.ndarray = context.clip.encode_text(inputs.tokens).float().cpu().numpy()
    return embeds


@torch.inference_mode()
def golden_samples(context: RunContext, inputs: GoldenInputs, text_embeds: np.ndarray) -> GoldenSamples:
    """The inputs, what the image tower makes of them with the updates that are applied to it now, and `text_embeds` (n, D)."""
    clip = context.clip
    return GoldenSamples(
        clip.preprocess.normalize(inputs.pixels).numpy(),
        clip.encode_image(inputs.pixels).float().cpu().numpy(),
        inputs.tokens.cpu().numpy(),
        text_embeds,
        inputs.pictures,
        inputs.prompts,
    )


def _picture(image: Image.Image, turn: int) -> np.ndarray:
    """An image as a client may have it, uint8 (h, w, 3): as it is, as an enlarged landscape, and as the same held upright.

    So that resizing and cropping are tried, whatever the sizes of the images of a task. The last is what a client sees of a
    photograph once its EXIF orientation is applied.
    """
    rgb = image.convert("RGB")  # with data.decode = "open_clip" images come as they are stored
    if not turn:
        return np.array(rgb, np.uint8)
    side = max(image.size) * 5 // 3
    landscape = rgb.resize((side, side), Image.Resampling.BICUBIC).crop((0, side // 6, side, side - side // 6))
    return np.array(landscape if turn == 1 else landscape.transpose(Image.Transpose.ROTATE_90), np.uint8)
