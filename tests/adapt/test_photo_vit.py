"""The packaged vision transformer that knows photographs."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from export.exporting import export
from safetensors.torch import load_file, save_file
from settings import POOL
from timm.models import VisionTransformer

from r1export.adapt.blocks import routing_token
from r1export.adapt.clip import Clip, load_clip
from r1export.adapt.evaluate import class_embeddings, image_embeddings
from r1export.adapt.frozen_start import frozen_start
from r1export.adapt.image_cache import Pixels
from r1export.adapt.inject import eject_experts_, inject_experts_
from r1export.adapt.model_config import read_model_config
from r1export.adapt.photo_vit import BACKBONE, EXTENDS
from r1export.adapt.preprocess_settings import OPENAI
from r1export.data.synthetic import BUILTIN_MODELS, load_builtin
from r1export.errors import InputError

WEIGHTS, CONFIG = BUILTIN_MODELS["photo-vit"]
SMALL_VIT = {"image_size": 16, "layers": 1, "width": 16, "head_width": 16, "patch_size": 8}
SMALL_TEXT = {"context_length": 8, "vocab_size": 50, "layers": 1, "width": 16, "heads": 1}
BLOCKS = replace(POOL, layers=(-4, -3, -2, -1))


@pytest.fixture(scope="module")
def base() -> Clip:
    return load_clip(weights=WEIGHTS, config=CONFIG, preprocess=OPENAI)


def test_a_config_names_the_tower_once_r1export_is_imported() -> None:
    trunk = read_model_config(CONFIG).build("meta").visual.trunk
    assert isinstance(trunk, VisionTransformer)
    assert trunk.has_class_token


def test_its_file_is_small_because_photo_has_the_rest(base: Clip) -> None:
    assert WEIGHTS.stat().st_size < 7e6
    weights, config = BUILTIN_MODELS["photo"]
    photo = load_clip(weights=weights, config=config, preprocess=OPENAI)
    own, others = base.model.state_dict(), photo.model.state_dict()
    assert torch.equal(own[f"{BACKBONE}blocks.6.0.conv_pw.weight"], others["visual.trunk.blocks.6.0.conv_pw.weight"])
    assert torch.equal(own["token_embedding.weight"], others["token_embedding.weight"])


def test_without_the_file_that_has_the_rest_it_is_refused(tmp_path: Path) -> None:
    shutil.copy(WEIGHTS, tmp_path)
    with pytest.raises(InputError, match="photo-lite0-128"):
        load_clip(weights=tmp_path / WEIGHTS.name, config=CONFIG, preprocess=OPENAI)


def test_the_rest_is_never_read_from_another_folder(tmp_path: Path) -> None:
    photo = BUILTIN_MODELS["photo"].weights
    save_file(load_file(WEIGHTS), tmp_path / "w.safetensors", metadata={EXTENDS: f"{photo.parent}/{photo.name}"})
    with pytest.raises(InputError, match="Invalid name"):
        load_clip(weights=tmp_path / "w.safetensors", config=CONFIG, preprocess=OPENAI)


def test_a_file_that_extends_itself_is_refused(tmp_path: Path) -> None:
    save_file(load_file(WEIGHTS), tmp_path / "w.safetensors", metadata={EXTENDS: "w.safetensors"})
    with pytest.raises(InputError, match=r"extends w\.safetensors, which extends another file"):
        load_clip(weights=tmp_path / "w.safetensors", config=CONFIG, preprocess=OPENAI)


def test_it_names_photographs_that_it_was_not_taught_here(base: Clip) -> None:
    probe = load_builtin("objects33")
    rows = np.arange(0, len(probe.test), 3)
    images = image_embeddings(base, Pixels(probe.test.subset(rows), base.preprocess))
    assert ((images @ class_embeddings(base, probe).T).argmax(1) == probe.test.labels[rows]).mean() > 0.8


def test_experts_stand_in_the_attention_and_the_mlp_of_the_transformer_and_are_routed_by_the_class_token(
    base: Clip,
) -> None:
    assert routing_token(base.model, "visual", POOL) == "first"
    pools = inject_experts_(base.model, replace(BLOCKS, towers=("visual",)))
    eject_experts_(base.model)
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert {rows.parameter for rows in pools} == {
        f"visual.trunk.blocks.{i}.{layer}.weight" for i in range(4) for layer in layers
    }
    assert len(pools) == 4 * 6


def test_the_convolutions_below_the_transformer_are_computed_once_per_image(base: Clip) -> None:
    start = frozen_start(base, BLOCKS)
    assert start is not None
    assert (start.block, start.entering) == ("visual.trunk.blocks.0", (17, 256))


def test_the_exported_graph_gives_what_torch_gives(base: Clip, tmp_path: Path) -> None:
    model = open_clip.CLIP(256, SMALL_VIT, SMALL_TEXT).eval()
    model.visual = base.model.visual
    assert export(model, tmp_path).error(3) < 2e-6
