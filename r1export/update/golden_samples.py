"""The golden samples of a release: real images and prompts, the towers' inputs, and their outputs.

A client that reproduces them has the same pipeline as in training, from image and prompt to embedding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from r1export.errors import InputError
from r1export.update.embedding_space import EmbeddingSpace
from r1export.update.names import DIGEST, NAME
from r1export.update.release_layout import GOLDEN, TEXTUAL, VISUAL
from r1export.update.strict_json import parse_json

SAMPLES = 8  # images, and prompts, in every release
PICTURES = 3  # images that are stored before preprocessing too
# How far preprocess.onnx, which resizes in float32, may be off: at most, and on average, in steps of a byte. docs/models.md
# says how often a byte differs.
BYTES, MEAN_BYTES = 1.5, 0.1
_PROMPTS, _SPACE = "prompts", "embedding_space"


@dataclass(frozen=True)
class GoldenSamples:
    """`pixel_values` (n, 3, H, W) and `input_ids` (n, L) with their unit-norm embeddings (n, D) by torch.

    `pictures`, uint8 (h, w, 3) of any size, upright as a client sees them, are those of the first rows of `pixel_values`;
    `prompts` are those of the rows of `input_ids`. `embedding_space` is the one that the embeddings are of; files of older
    versions of r1export do not say.
    """

    pixel_values: np.ndarray
    image_embeds: np.ndarray
    input_ids: np.ndarray
    text_embeds: np.ndarray
    pictures: tuple[np.ndarray, ...] = ()
    prompts: tuple[str, ...] = ()
    embedding_space: EmbeddingSpace | None = None

    def tensors(self) -> dict[str, np.ndarray]:
        """What golden.safetensors holds; the prompts as a JSON array in UTF-8."""
        space = {_SPACE: _bytes(self.embedding_space.to_json())} if self.embedding_space else {}
        return {
            TEXTUAL.input: self.input_ids,
            VISUAL.input: self.pixel_values,
            VISUAL.output: self.image_embeds,
            TEXTUAL.output: self.text_embeds,
            **{f"picture_{i}": picture for i, picture in enumerate(self.pictures)},
            _PROMPTS: _bytes(self.prompts),
            **space,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> GoldenSamples:
        """Inverse of `tensors`. Raises InputError for a tensor that is missing, or prompts that are none."""
        if missing := [name for end in (VISUAL, TEXTUAL) for name in (end.input, end.output) if name not in tensors]:
            raise InputError(f"{GOLDEN} has no {', '.join(missing)}", "export the release again")
        pictures = tuple(tensors[f"picture_{i}"] for i in range(len(tensors)) if f"picture_{i}" in tensors)
        if wrong := [picture.shape for picture in pictures if picture.dtype != np.uint8 or picture.shape[2:] != (3,)]:
            raise InputError(
                f"{GOLDEN}: an image of shape {wrong[0]}, expected uint8 (h, w, 3)", "export the release again"
            )
        return cls(
            tensors[VISUAL.input], tensors[VISUAL.output], tensors[TEXTUAL.input], tensors[TEXTUAL.output],
            pictures, _prompts(tensors[_PROMPTS]) if _PROMPTS in tensors else (),
            _space(tensors[_SPACE]) if _SPACE in tensors else None,
        )  # fmt: skip


def _bytes(value: object) -> np.ndarray:
    """A value as JSON in UTF-8."""
    return np.frombuffer(json.dumps(value, ensure_ascii=False).encode(), np.uint8)


def _space(text: np.ndarray) -> EmbeddingSpace:
    members = parse_json(text.tobytes(), f"{GOLDEN}.{_SPACE}", 1 << 10)
    found = {name: members.text(name, DIGEST) for name in members.names(NAME, 3)}
    return EmbeddingSpace.of_members(found, f"{GOLDEN}.{_SPACE}")


def _prompts(text: np.ndarray) -> tuple[str, ...]:
    try:
        prompts = json.loads(text.tobytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{GOLDEN}: the prompts are not JSON: {error}", "export the release again") from error
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError(f"{GOLDEN}: the prompts are not a list of strings", "export the release again")
    return tuple(prompts)
