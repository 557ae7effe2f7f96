"""The golden samples of a release. Which images and prompts they are depends only on the tasks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from r1export.pipeline.context import RunContext
from r1export.update.golden_samples import PICTURES, SAMPLES, GoldenSamples

ODD_PROMPTS = (  # other scripts, symbols, capitals, and more tokens than a tower takes
    "ein Foto von einem Käfer auf 花卉 🐞",
    "A PHOTO,  of “two” CATS & 3 dogs!",
    "a very long prompt " * 40,
)


@dataclass(frozen=True)
class GoldenInputs:
    """`pixels`, uint8 (n, 3, H, W), cropped; `tokens` (n, L); the images and prompts they are computed from."""

    pixels: Tensor
    tokens: Tensor
    pictures: tuple[np.ndarray, ...]
    prompts: tuple[str, ...]


def golden_inputs(context: RunContext) -> GoldenInputs:
    """Test images of all tasks in turn, prompts of their classes and unusual prompts."""
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
    """Embeddings of the prompts by the text tower with its current updates: float32 (n, D)."""
    embeds: np.ndarray = context.clip.encode_text(inputs.tokens).float().cpu().numpy()
    return embeds


@torch.inference_mode()
def golden_samples(context: RunContext, inputs: GoldenInputs, text_embeds: np.ndarray) -> GoldenSamples:
    """The inputs, image embeddings by the model with its current updates, and `text_embeds` (n, D)."""
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
    """An image as a client may have it, uint8 (h, w, 3): as it is, enlarged in landscape format, or in portrait format.

    This covers resizing and cropping whatever the image sizes of a task. The last one is a photo after its EXIF
    orientation is applied.
    """
    rgb = image.convert("RGB")  # with data.decode = "open_clip" images keep their stored mode
    if not turn:
        return np.array(rgb, np.uint8)
    side = max(image.size) * 5 // 3
    landscape = rgb.resize((side, side), Image.Resampling.BICUBIC).crop((0, side // 6, side, side - side // 6))
    return np.array(landscape if turn == 1 else landscape.transpose(Image.Transpose.ROTATE_90), np.uint8)
