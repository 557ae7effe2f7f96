"""Models of other families from recipe to client: the same ids and embeddings with onnxruntime, numpy, Pillow and tokenizers alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from clients import run_as_client
from families import FAMILIES
from PIL import Image
from running import context_of, r1export
from typed_texts import in_reach, typed_texts

from r1export.pipeline.context import RunContext

CLIENT = """
import json
import numpy as np, onnxruntime as ort
from PIL import Image
from tokenizers import Tokenizer

texts = json.load(open("texts.json", encoding="utf-8"))
ids = np.array([e.ids for e in Tokenizer.from_file("tokenizer/tokenizer.json").encode_batch(texts)], np.int64)
pixels = ort.InferenceSession("preprocess.onnx").run(None, {"image": np.asarray(Image.open("photo.png"))})[0]
embed = lambda graph, name, value: ort.InferenceSession(graph).run(None, {name: value})[0]
np.savez("answers.npz", ids=ids, pixels=pixels, images=embed("visual.onnx", "pixel_values", pixels), texts=embed("textual.onnx", "input_ids", ids))
"""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def run(family: str, family_run) -> Path:
    return family_run(family)


@pytest.fixture(scope="module")
def context(run: Path) -> RunContext:
    return context_of(run)


def test_a_run_of_this_family_is_verified(run: Path) -> None:
    done = r1export("verify", run, "--no-latency")
    assert done.returncode == 0, done.output


def test_a_client_gets_the_ids_and_embeddings_of_the_lab(run: Path, context: RunContext) -> None:
    release, clip = run / "releases" / "01-digits", context.clip
    texts = ["a photo of a cat.", "", "T-Shirt &amp; jeans"] + [text for text in typed_texts(300) if in_reach(text)]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 90, 3), np.uint8))
    (release / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    picture.save(release / "photo.png")
    run_as_client(CLIENT, release)
    with np.load(release / "answers.npz") as answers:
        assert np.array_equal(answers["ids"], clip.tokenize(texts).numpy())
        with context.with_updates_applied(context.run.updates(context.recipe)), torch.no_grad():
            texts_here = clip.encode_text(torch.from_numpy(answers["ids"])).numpy()
            images_here = clip.model.encode_image(torch.from_numpy(answers["pixels"]), normalize=True).numpy()
        assert np.abs(answers["texts"] - texts_here).max() < 5e-6
        assert np.abs(answers["images"] - images_here).max() < 5e-6
        levels = (
            np.abs(
                answers["pixels"]
                - clip.preprocess.normalize(torch.from_numpy(clip.preprocess.crop(picture))[None]).numpy()
            )
            * 127.5
        )
        assert levels.max() <= 2.01
    for name in ("texts.json", "photo.png", "answers.npz"):
        (release / name).unlink()


def test_the_release_has_the_preprocessing_and_the_tokenizer_of_the_folder(run: Path, family: str) -> None:
    release, (kind, _, preprocess) = run / "releases" / "00-base", FAMILIES[family]
    written = json.loads((release / "preprocess.json").read_text(encoding="utf-8"))
    assert written.items() >= preprocess.items()
    config = json.loads((release / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["pad_token"] == {"gemma": "<pad>", "bert": "[PAD]", "roberta": "<pad>"}[kind]
    assert json.loads((release / "manifest.json").read_text(encoding="utf-8"))["base"]["name"] == "local-dir:base"
