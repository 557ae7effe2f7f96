"""Small real models shared by all tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

SHARED = Path(__file__).parents[1].parent / "shared"
TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny models are slower on several threads, and results do not depend on how many there are."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory) -> tuple[Path, Path]:
    """Weights and config of a two-layer CLIP with random weights: for structure, never for accuracy."""
    import open_clip
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("tiny")
    config, weights = folder / "tiny-clip.json", folder / "tiny-clip.safetensors"
    config.write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": {}}), encoding="utf-8")
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**TINY).state_dict(), weights)
    return weights, config


@pytest.fixture
def tiny_clip(tiny_files):
    """A fresh tiny Clip: a test may change it."""
    from r1export.adapt.clip import load_clip

    return load_clip(weights=tiny_files[0], config=tiny_files[1])


@pytest.fixture(scope="session")
def stripes():
    """A task of two classes: stripes across and stripes down, 24 images to train on and 16 to test."""
    from r1export.data.task import ImageSet, Task

    def draw(i: int) -> Image.Image:
        rng = np.random.default_rng(i)
        wave = (np.arange(16) // 2 % 2 * 160 + rng.integers(0, 60)).astype(np.uint8)
        plane = np.tile(wave, (16, 1)) if i % 2 else np.tile(wave[:, None], (1, 16))
        return Image.fromarray(np.repeat(plane[:, :, None], 3, 2))

    def images(start: int, count: int) -> ImageSet:
        return ImageSet.drawn(np.arange(start, start + count) % 2, lambda i: draw(start + i))

    return Task(
        "stripes", ("horizontal stripes", "vertical stripes"), ("a photo of {}.", "{}"), images(0, 24), images(1000, 16)
    )
