"""The code of a release's README.md, as it stands, on real photographs."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import numpy as np
import pytest
from clients import run_as_client, snippets
from PIL import Image
from running import context_of, trained_run
from sklearn.datasets import load_sample_image

from r1export.data.photos import CUT, NAMES, SIDE
from r1export.update.container import read_tensors

RECIPE = (
    '[base]\nmodel = "builtin:world"\n[[tasks]]\nname = "photos"\nsource = "builtin:photos"\n'
    "[train]\nlearning_rate = 5e-3\n[pool]\nalpha = 12.0\n"
)
SETTINGS = ("tasks.0.name=photos", "tasks.0.source=builtin:photos", "train.iterations=40", "data.shots=32")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return trained_run(tmp_path_factory.mktemp("card"), RECIPE, *SETTINGS)


@pytest.fixture
def release(run: Path, tmp_path: Path) -> Path:
    """A copy of the release after the task, to which a test adds its picture."""
    return Path(shutil.copytree(run / "releases" / "01-photos", tmp_path / "release"))


@pytest.mark.parametrize("name", NAMES)
def test_a_real_photograph_is_named_right(name: str, release: Path) -> None:
    """A wide piece of the half that was not trained on, as a JPEG that is upright only with its EXIF orientation."""
    photo = Image.fromarray(load_sample_image(NAMES[name])[150 : 150 + SIDE, CUT:])
    stored = photo.transpose(Image.Transpose.ROTATE_90)
    stored.getexif()[0x0112] = 6
    stored.save(release / "photo.jpg", quality=95, exif=stored.getexif())
    code = snippets((release / "README.md").read_text(encoding="utf-8"))[0]
    assert run_as_client(code, release).strip() == name


def test_texts_become_the_embeddings_of_the_lab(run: Path, release: Path) -> None:
    code = snippets((release / "README.md").read_text(encoding="utf-8"))[1]
    texts = [f"a photo of a {name}." for name in NAMES]
    assert ast.literal_eval(code.partition("TEXTS = ")[2].splitlines()[0])
    code = code.replace("TEXTS = ", f"TEXTS = {texts!r} or ").replace("print(", 'np.save("rows.npy", ')
    run_as_client(code, release)
    stored = read_tensors(release / "classes" / "photos.safetensors")["class_embeds"]
    assert np.abs(np.load(release / "rows.npy") - stored).max() < 1e-5
    assert context_of(run).tasks[0].templates == ("a photo of a {}.",)
