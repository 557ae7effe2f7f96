"""How pictures are prepared is known or asked for: the recipe, the config, the tags of a family, never a silent default."""

from __future__ import annotations

import open_clip
import pytest

from r1export.adapt.preprocess_settings import OPENAI, PreprocessSettings, of_config, of_family
from r1export.errors import InputError

UNDECIDED = ("ViT-H-14", "ViT-H-14-quickgelu", "ViT-L-14")


@pytest.mark.parametrize(
    ("model", "mean", "interpolation", "resize_mode"),
    [
        ("MobileCLIP-S1", (0.0, 0.0, 0.0), "bilinear", "shortest"),
        ("PE-Core-T-16-384", (0.5, 0.5, 0.5), "bilinear", "squash"),
        ("ViT-B-16-SigLIP", (0.5, 0.5, 0.5), "bicubic", "squash"),
        ("ViT-B-16-SigLIP2", (0.5, 0.5, 0.5), "bicubic", "squash"),
        ("ViT-B-32", open_clip.OPENAI_DATASET_MEAN, "bicubic", "shortest"),
    ],
)
def test_local_weights_are_prepared_as_all_tags_of_their_model_say(model, mean, interpolation, resize_mode) -> None:
    found = of_family(model, PreprocessSettings())
    assert found.values["mean"] == mean
    assert (found.values["interpolation"], found.values["resize_mode"]) == (interpolation, resize_mode)
    assert f"so say all tags of {model}" in found.note


@pytest.mark.parametrize("model", open_clip.list_models())
def test_every_model_of_open_clip_is_known_or_refused_by_what_is_missing(model: str) -> None:
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tags and model not in UNDECIDED:
        found = of_family(model, PreprocessSettings())
        assert all(
            of_config(open_clip.get_pretrained_cfg(model, tag), PreprocessSettings()).values.items()
            >= found.values.items()
            for tag in tags
        )
    else:
        with pytest.raises(
            InputError, match=r"tags differ in .*set base\." if tags else r"unknown preprocessing.*set base\.mean"
        ):
            of_family(model, PreprocessSettings())


def test_the_recipe_comes_first_and_decides_what_the_tags_do_not() -> None:
    assert of_family("ViT-H-14", PreprocessSettings(resize_mode="squash")).values["resize_mode"] == "squash"
    assert of_family("", OPENAI).note == ""
    assert of_config({"mean": [0, 0, 0]}, PreprocessSettings(mean=(0.1, 0.2, 0.3))).values["mean"] == (0.1, 0.2, 0.3)


def test_a_config_means_open_clips_defaults_where_it_is_silent() -> None:
    found = of_config({"mean": [0.5, 0.5, 0.5], "fill_color": 9, "other": 1}, PreprocessSettings()).values
    assert (found["std"], found["fill_color"]) == (open_clip.OPENAI_DATASET_STD, 9)
    assert of_config(None, OPENAI) is None
