"""open_clip behind one noun: the same numbers, weights without pickle, errors that name the place."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from conftest import TINY
from open_clip.transform import image_transform_v2
from open_clip.transformer import QuickGELU
from PIL import Image
from safetensors.torch import save_file

from r1export.adapt.clip import licence, load_clip
from r1export.errors import InputError
from r1export.update.container import digest


@pytest.mark.parametrize("size", [(16, 16), (37, 20), (9, 64)])
def test_preprocessing_is_open_clips_bit_for_bit(tiny_clip, size) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    transform = image_transform_v2(tiny_clip.preprocess.config, is_train=False)
    pixels = torch.from_numpy(tiny_clip.preprocess.crop(image))[None]
    assert torch.equal(tiny_clip.preprocess.normalize(pixels)[0], transform(image))


def test_embeddings_have_unit_norm_and_are_open_clips(tiny_clip) -> None:
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    found = tiny_clip.encode_image(pixels)
    assert torch.equal(found, tiny_clip.model.encode_image(tiny_clip.preprocess.normalize(pixels), normalize=True))
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(2))


def test_a_copy_with_other_weights_shares_their_memory_and_leaves_the_model_as_it_was(tiny_clip) -> None:
    before = tiny_clip.parameters()
    weights = {name: np.array(value * np.float32(1.5)) for name, value in before.items()}
    other = tiny_clip.with_weights(weights)
    assert digest(other.parameters()) == digest(weights)
    assert digest(tiny_clip.parameters()) == digest(before)
    shared = other.model.state_dict(keep_vars=True)
    assert all(value.data_ptr() == weights[name].ctypes.data for name, value in shared.items() if name in weights)
    assert not any(p.requires_grad for p in other.model.parameters())


def test_an_unloaded_clip_has_no_weights_in_memory_until_it_gets_them_back(tiny_clip) -> None:
    before = tiny_clip.parameters()
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    expected = tiny_clip.encode_image(pixels)
    with tiny_clip.unloaded(before):
        assert sum(value.nbytes for value in tiny_clip.parameters().values()) == 0
    assert digest(tiny_clip.parameters()) == digest(before)
    assert torch.equal(tiny_clip.encode_image(pixels), expected)
    tiny_clip.load_({name: value * 0 for name, value in before.items()})
    assert all(value.any() for name, value in before.items() if name.endswith("proj")), "they are a copy"


def test_a_loaded_clip_is_frozen_and_in_eval_mode(tiny_clip) -> None:
    assert not tiny_clip.model.training
    assert not any(p.requires_grad for p in tiny_clip.model.parameters())


def test_parameters_can_be_taken_out_and_put_back(tiny_clip) -> None:
    before = tiny_clip.parameters()
    tiny_clip.load_({name: value * 0 for name, value in before.items()})
    assert digest(tiny_clip.parameters()) != digest(before)
    tiny_clip.load_(before)
    assert digest(tiny_clip.parameters()) == digest(before)


def test_the_digest_sees_one_changed_bit_and_a_changed_name(tiny_clip) -> None:
    weights = tiny_clip.parameters()
    changed = weights | {"logit_scale": np.nextafter(weights["logit_scale"], np.float32(9))}
    renamed = {("x" if name == "logit_scale" else name): value for name, value in weights.items()}
    assert len({digest(weights), digest(changed), digest(renamed)}) == 3


def test_weights_that_are_a_pickle_are_refused_unread(tmp_path, tiny_files) -> None:
    """The pickle would make a file when it is read."""

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "went off"), "w"))

    torch.save({"w": Bomb()}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors: not a safetensors file"):
        load_clip(weights=tmp_path / "model.safetensors", config=tiny_files[1])
    assert not (tmp_path / "went off").exists()


@pytest.fixture
def tagged(tmp_path, monkeypatch):
    """Makes a file the weights of ViT-B-32 with the tag `openai`, built as small as TINY; no network is asked."""

    def publish(name: str, state: dict) -> Path:
        file = tmp_path / name
        save_file(state, file) if name.endswith(".safetensors") else torch.save(state, file)
        monkeypatch.setattr("open_clip.download_pretrained", lambda cfg, **_: str(file))
        monkeypatch.setattr("open_clip.get_model_config", lambda name: copy.deepcopy(TINY))
        return file

    return publish


def test_a_tag_in_safetensors_is_loaded_with_its_own_preprocessing(tiny_clip, tagged) -> None:
    tagged("w.safetensors", tiny_clip.model.state_dict())
    found = load_clip("ViT-B-32", pretrained="openai")
    assert digest(found.parameters()) == digest(tiny_clip.parameters())
    assert found.preprocess.config.mean == open_clip.get_pretrained_cfg("ViT-B-32", "openai")["mean"]


@pytest.mark.parametrize(("tag", "activation"), [("openai", QuickGELU), ("laion2b_s34b_b79k", torch.nn.GELU)])
def test_a_tag_gets_the_activation_that_it_was_trained_with(tag: str, activation: type, tiny_clip, tagged) -> None:
    tagged("w.safetensors", tiny_clip.model.state_dict())
    model = load_clip("ViT-B-32", pretrained=tag).model
    for tower in (model.visual, model):
        assert isinstance(tower.transformer.resblocks[0].mlp.gelu, activation)


@pytest.mark.parametrize("name", ["w.pt", "w.bin"])
def test_a_tag_that_is_a_pickle_is_refused_unread_unless_it_is_allowed(
    name: str, tiny_clip, tagged, monkeypatch
) -> None:
    file = tagged(name, tiny_clip.model.state_dict())
    read, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, **options: read.append(options) or load(path, **options))
    with pytest.raises(InputError, match=rf"{re.escape(str(file))} is not safetensors.*base\.allow_pickle=true"):
        load_clip("ViT-B-32", pretrained="openai")
    assert read == []
    found = load_clip("ViT-B-32", pretrained="openai", allow_pickle=True)
    assert digest(found.parameters()) == digest(tiny_clip.parameters())
    assert [options["weights_only"] for options in read] == [True]


def test_missing_weights_are_named(tmp_path, tiny_files) -> None:
    with pytest.raises(InputError, match=r"none\.safetensors: no such file"):
        load_clip(weights=tmp_path / "none.safetensors", config=tiny_files[1])


def test_weights_of_another_model_are_refused_by_the_first_difference(tmp_path, tiny_files) -> None:
    config = json.loads(tiny_files[1].read_text())
    config["model_cfg"]["vision_cfg"]["width"] = 48
    (tmp_path / "wider.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"does not match the model: .*visual"):
        load_clip(weights=tiny_files[0], config=tmp_path / "wider.json")


@pytest.mark.parametrize("text", ["{", "[]", "3", '"x"', '{"embed_dim": 8}'])
def test_a_config_that_is_none_is_refused(text: str, tmp_path, tiny_files) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(InputError, match=r"bad\.json"):
        load_clip(weights=tiny_files[0], config=tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("", "colour", "red"),
        ("vision_cfg", "colour", "red"),
        ("text_cfg", "colour", "red"),
        ("vision_cfg", "width", "wide"),
        ("vision_cfg", "width", -32),
        ("vision_cfg", "head_width", 0),
        ("", "text_cfg", 3),
        ("", "vision_cfg", None),
    ],
)
def test_a_config_with_an_unknown_key_or_an_impossible_value_is_refused_by_name(
    section: str, key: str, value: object, tmp_path, tiny_files
) -> None:
    config = json.loads(tiny_files[1].read_text())
    (config["model_cfg"][section] if section else config["model_cfg"])[key] = value
    (tmp_path / f"odd-{section}-{key}-{value}.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=rf"odd-{section}-{key}-{value}\.json: open_clip fails to build the model"):
        load_clip(weights=tiny_files[0], config=tmp_path / f"odd-{section}-{key}-{value}.json")


def test_an_unknown_model_and_an_unknown_tag_are_refused_with_what_is_known() -> None:
    with pytest.raises(InputError, match="has no model 'ViT-Z-1'"):
        load_clip("ViT-Z-1", pretrained="openai")
    with pytest.raises(InputError, match=r"no pretrained tag 'nobody'.*openai"):
        load_clip("ViT-B-16", pretrained="nobody")


def test_a_licence_is_named_where_it_is_known_and_never_guessed() -> None:
    assert [licence(tag) for tag in ("openai", "laion2b_s34b_b79k", "metaclip_400m", "")] == ["MIT", "MIT", "", ""]
