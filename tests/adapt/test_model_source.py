"""Folders and repositories as open_clip saves them, and what is said of those that are incomplete."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY
from hub_tokenizers import write_hub_tokenizer
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file

from r1export.adapt import hub_tokenizer
from r1export.adapt.clip import load_clip
from r1export.errors import InputError, Unsupported
from r1export.update.container import digest

PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bilinear", "resize_mode": "squash"}


@pytest.fixture
def folder(tmp_path, tiny_files) -> Path:
    """A model as `open_clip.push_to_hf_hub` saves one."""
    saved = tmp_path / "my-clip"
    saved.mkdir()
    shutil.copyfile(tiny_files[0], saved / "open_clip_model.safetensors")
    (saved / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": TINY, "preprocess_cfg": PREPROCESS}), encoding="utf-8"
    )
    return saved


def test_a_folder_is_a_model_with_its_own_preprocessing(folder, tiny_clip) -> None:
    clip = load_clip(f"local-dir:{folder}")
    assert digest(clip.parameters()) == digest(tiny_clip.parameters())
    assert (clip.name, clip.preprocess.config.mean, clip.preprocess.config.resize_mode) == (
        "local-dir:my-clip",
        [0.5] * 3,
        "squash",
    )


def test_a_repository_is_fetched_file_by_file(folder, tiny_clip, monkeypatch) -> None:
    def fetch(repository: str, name: str) -> str:
        assert repository == "someone/my-clip"
        if not (folder / name).exists():
            raise EntryNotFoundError("404")
        return str(folder / name)

    monkeypatch.setattr(hub_tokenizer, "hf_hub_download", fetch)
    clip = load_clip("hf-hub:someone/my-clip")
    assert digest(clip.parameters()) == digest(tiny_clip.parameters())
    assert (clip.name, clip.preprocess.config.interpolation) == ("hf-hub:someone/my-clip", "bilinear")
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(InputError, match="hf-hub:someone/my-clip has none of open_clip_model"):
        load_clip("hf-hub:someone/my-clip")


def test_a_repository_that_cannot_be_reached_is_a_matter_of_the_environment(monkeypatch) -> None:
    def fetch(*_: str) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub_tokenizer, "hf_hub_download", fetch)
    with pytest.raises(Unsupported, match=r"someone/clip: cannot download open_clip_config\.json: no route to host"):
        load_clip("hf-hub:someone/clip")


def test_the_tokenizer_of_a_folder_is_used_where_its_config_names_one(folder) -> None:
    config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    config["model_cfg"]["text_cfg"] |= {
        "hf_tokenizer_name": "someone/words",
        "tokenizer_kwargs": {"clean": "canonicalize"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match=r"text_cfg\.hf_tokenizer_name.*base\.tokenizer"):
        load_clip(f"local-dir:{folder}")
    write_hub_tokenizer("t5", folder)
    assert load_clip(f"local-dir:{folder}").tokenize(["A cat!"])[0, -1] == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "open_clip_config.json").unlink(), "no open_clip_config.json in it"),
        (lambda folder: (folder / "open_clip_model.safetensors").unlink(), "no weights in it"),
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (
            lambda folder: (folder / "open_clip_config.json").write_text('{"model_cfg": 3}'),
            "model_cfg: found 3, expected an object",
        ),
        (lambda folder: _in_parts(folder), "found model-00001-of-00002.safetensors, model-00002-of-00002.safetensors"),
        (
            lambda folder: (folder / "open_clip_model.safetensors").rename(folder / "pytorch_model.bin"),
            "is not safetensors",
        ),
    ],
)
def test_an_incomplete_folder_is_one_line(change, words: str, folder) -> None:
    change(folder)
    with pytest.raises(InputError, match=words):
        load_clip(f"local-dir:{folder}")


def _in_parts(folder: Path) -> None:
    state = load_file(folder / "open_clip_model.safetensors")
    (folder / "open_clip_model.safetensors").unlink()
    for number in (1, 2):
        save_file(dict(list(state.items())[number::2]), folder / f"model-0000{number}-of-00002.safetensors")


def test_weights_without_a_word_on_pictures_are_refused_and_the_recipe_can_say_it(folder) -> None:
    (folder / "plain.json").write_text(json.dumps(TINY), encoding="utf-8")
    arguments = {"weights": folder / "open_clip_model.safetensors", "config": folder / "plain.json"}
    with pytest.raises(InputError, match=r"unknown preprocessing.*base\.mean.*preprocess_cfg"):
        load_clip(**arguments)


def test_a_config_that_is_given_with_its_preprocessing_is_taken(folder) -> None:
    clip = load_clip(weights=folder / "open_clip_model.safetensors", config=folder / "open_clip_config.json")
    assert clip.preprocess.to_json()["std"] == [0.25, 0.25, 0.25]
    assert clip.encode_image(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)).shape == (1, 24)
