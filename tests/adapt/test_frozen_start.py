"""What no expert changes is computed once: towers that start at their first block with experts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from settings import POOL, TRAIN
from torch import nn

from r1export.adapt.clip import Clip, load_clip
from r1export.adapt.frozen_start import BlockInputs, frozen_start, late_clip
from r1export.adapt.image_cache import Images, Pixels
from r1export.adapt.inject import eject_experts_, inject_experts_
from r1export.adapt.pack import pack_experts
from r1export.adapt.trainer import TrainingTask, reset_pools_, train_pools_

LAST = replace(POOL, layers=(-1,), alpha=12.0)
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}


def timm_clip(trunk: str, size: int, folder: Path) -> Clip:
    """A CLIP of random weights with a timm tower."""
    vision = {"timm_model_name": trunk, "timm_pool": "", "timm_proj": "linear", "image_size": size}
    if not trunk.startswith("test_vit"):
        vision["timm_pool"] = "avg"
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT}
    (folder / "config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3}}))
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**config).state_dict(), folder / "weights.safetensors")
    return load_clip(weights=folder / "weights.safetensors", config=folder / "config.json")


def embeddings(clip: Clip, images: Images) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([clip.encode_image(batch) for batch in images.batches(10)])


@pytest.mark.parametrize(
    ("trunk", "size"), [("test_efficientnet", 32), ("fastvit_t8", 64), ("test_vit", 160), ("test_convnext", 64)]
)
def test_a_tower_that_starts_at_its_last_block_gives_the_same_embeddings(trunk, size, tmp_path, stripes) -> None:
    clip = timm_clip(trunk, size, tmp_path)
    pixels = Pixels(stripes.test, clip.preprocess)
    start = frozen_start(clip, LAST)
    assert start is not None
    found = embeddings(late_clip(clip, start), BlockInputs(pixels, clip, start))
    torch.testing.assert_close(found, embeddings(clip, pixels), rtol=0, atol=1e-6)
    torch.testing.assert_close(embeddings(clip, pixels), found, rtol=0, atol=1e-6)  # the model is as it was


def test_nothing_is_gained_where_the_first_block_or_no_image_tower_has_experts(tiny_clip) -> None:
    assert frozen_start(tiny_clip, POOL) is None
    assert frozen_start(tiny_clip, replace(POOL, layers=(0, 1))) is None
    assert frozen_start(tiny_clip, replace(LAST, towers=("textual",))) is None
    assert frozen_start(tiny_clip, LAST) is not None


def test_each_image_goes_once_through_what_is_frozen(tiny_clip, stripes, monkeypatch) -> None:
    start, pixels = frozen_start(tiny_clip, LAST), Pixels(stripes.train, tiny_clip.preprocess)
    kept = BlockInputs(pixels, tiny_clip, start)
    passed: list[int] = []
    tiny_clip.model.visual.conv1.register_forward_hook(lambda module, args, output: passed.append(len(output)))
    first, again = kept.batch(np.array([5, 3, 5])), kept.batch(np.array([3, 4]))
    assert sum(passed) == 3
    assert torch.equal(first[1], again[0])
    assert torch.equal(first[0], first[2])
    too_large = BlockInputs(pixels, tiny_clip, start, budget=10)
    torch.testing.assert_close(too_large.batch(np.array([5, 3, 5])), first, rtol=0, atol=1e-6)


def test_experts_learn_the_same_from_the_first_block_with_experts_on(tiny_clip, stripes) -> None:
    start, pixels = frozen_start(tiny_clip, LAST), Pixels(stripes.train, tiny_clip.preprocess)
    settings = replace(TRAIN, iterations=6, batch_size=8, distill_weight=0.0)
    updates = []
    for clip, images in ((tiny_clip, pixels), (late_clip(tiny_clip, start), BlockInputs(pixels, tiny_clip, start))):
        pools = inject_experts_(clip.model, LAST)
        reset_pools_(pools, 1, 1)
        train_pools_(clip, pools, TrainingTask(1, stripes, images, settings))
        updates.append(pack_experts(pools))
        eject_experts_(clip.model)
    for rows, pair in updates[0].factors.items():
        np.testing.assert_allclose(updates[1].factors[rows].u, pair.u, rtol=0, atol=1e-5)
    assert max(np.abs(pair.u).max() for pair in updates[0].factors.values()) > 1e-4


def test_a_tower_that_reads_the_image_again_later_does_not_start_late(tiny_clip) -> None:
    class Twice(nn.Module):
        def __init__(self, tower: nn.Module) -> None:
            super().__init__()
            self.tower = tower

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.tower(image) + image.mean((1, 2, 3))[:, None]

    tiny_clip.model.visual = Twice(tiny_clip.model.visual)
    assert frozen_start(tiny_clip, LAST) is None
