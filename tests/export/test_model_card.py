"""The code of the model card, as it stands, in a Python that knows numpy, Pillow, onnxruntime and tokenizers only."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from clients import run_as_client, snippets
from PIL import Image

from r1export.adapt.clip import Preprocess
from r1export.data.images import Decoding, decode
from r1export.export.model_card import CARD, model_card
from r1export.export.text_cleaning import LIMITS
from r1export.update.atomic_io import write_json
from r1export.update.release_manifest import BaseModel, GoldenGate, ReleaseManifest, TaskEntry


def wide(size: tuple[int, int]) -> Image.Image:
    """Smooth waves with an edge, in color."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    planes = [127 + 100 * np.sin(x / 9 + c) * np.cos(y / (7 + c)) + 28 * (x > size[0] / 2) for c in range(3)]
    return Image.fromarray(np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8))


def gray16(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray((np.asarray(wide(size).convert("L")).astype(np.uint16) * 257) // 2)


def transparent(size: tuple[int, int]) -> Image.Image:
    image = wide(size)
    image.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, size[0]).astype(np.uint8), (size[1], 1))))
    return image


def palette(size: tuple[int, int]) -> Image.Image:
    image = wide(size).quantize(16)
    image.info["transparency"] = 3
    return image


def turned(size: tuple[int, int]) -> tuple[Image.Image, dict]:
    image = wide(size)
    image.getexif()[0x0112] = 6
    return image, {"exif": image.getexif()}


MANIFEST = ReleaseManifest(
    name="02-shapes", sequence=2, procedure="r1-f64-v1", precision="fp32", base=BaseModel("tiny", "0" * 64), updates=(),
    tasks=(TaskEntry("colours", 2, True, 0.0), TaskEntry("shapes", 3, True, 0.5), TaskEntry("sizes", 4, False, None)),
    graphs={}, golden=GoldenGate(5e-5, 0.999999), files={}, tensors={}, versions={},
)  # fmt: skip
PICTURES: dict[str, Callable[[], Image.Image | tuple[Image.Image, dict]]] = {
    "wide": lambda: wide((301, 64)),
    "tall": lambda: wide((33, 200)),
    "small": lambda: wide((7, 9)),
    "gray": lambda: wide((90, 61)).convert("L"),
    "gray of 16 bits": lambda: gray16((90, 61)),
    "transparent": lambda: transparent((120, 77)),
    "palette": lambda: palette((80, 80)),
    "turned": lambda: turned((120, 60)),
    "bilevel": lambda: wide((64, 32)).convert("1"),
}
MODES = [
    {"resize_mode": mode, "interpolation": method, "size": (16, 16), "fill_color": fill}
    for mode, method, fill in (
        ("shortest", "bicubic", 0),
        ("shortest", "bilinear", 0),
        ("longest", "bicubic", 127),
        ("squash", "bicubic", 0),
        ("squash", "bilinear", 9),
    )
] + [{"resize_mode": "shortest", "interpolation": "bicubic", "size": (16, 24), "fill_color": 0}]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """The files of PICTURES."""
    folder, files = tmp_path_factory.mktemp("card"), []
    for name, make in PICTURES.items():
        image, options = made if isinstance(made := make(), tuple) else (made, {})
        files.append(folder / f"{name}.png")
        image.save(files[-1], **options)
    return files


def prepared(pictures: list[Path], folder: Path) -> list[np.ndarray]:
    """What the card's code makes of each picture with the preprocess.json of `folder`: float32 (height, width, 3)."""
    opening, _, rest = snippets(model_card_of_anything())[0].partition("p = json")
    per_picture = textwrap.indent("p = json" + rest.partition("with open(")[0], "    ")
    files = [str(picture) for picture in pictures]
    code = f"{opening}\nfor PICTURE in {files!r}:\n{per_picture}\n    np.save(PICTURE, pixels)\n"
    run_as_client(code, folder)
    return [np.load(f"{picture}.npy") for picture in pictures]


def model_card_of_anything() -> str:
    return CARD.format_map(defaultdict(lambda: "x"))


@pytest.mark.parametrize(
    "mode", MODES, ids=lambda mode: f"{mode['resize_mode']}-{mode['interpolation']}-{mode['size'][1]}"
)
def test_the_pixels_are_the_labs_for_every_picture_and_resize_mode(mode, tiny_clip, pictures, tmp_path) -> None:
    preprocess = Preprocess(replace(tiny_clip.preprocess.config, **mode))
    write_json(tmp_path / "preprocess.json", preprocess.to_json())
    for picture, found in zip(pictures, prepared(pictures, tmp_path), strict=True):
        decoded = decode(picture, picture.name, Decoding(fill=preprocess.fill)).image
        expected = preprocess.normalize(torch.from_numpy(preprocess.crop(decoded))[None])[0]
        assert np.abs(found.transpose(2, 0, 1) - expected.numpy()).max() < 1e-5, picture.stem


def test_the_card_says_which_texts_may_get_other_ids() -> None:

    assert all(f"- {limit}\n" in model_card(MANIFEST) for limit in LIMITS)


def test_the_card_names_the_task_learned_last_and_all_there_are() -> None:
    code = snippets(model_card(MANIFEST))[0]
    assert 'TASK = "shapes"  # one of: colours, shapes, sizes' in code


def test_the_card_shows_an_accuracy_of_exactly_zero_and_one_that_was_not_measured() -> None:
    text = model_card(MANIFEST)
    assert "| colours | 2 | 0.0 % | yes |" in text
    assert "| sizes | 4 | not measured | no |" in text


def test_the_hub_s_own_library_reads_the_card_s_metadata() -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    tasks = (TaskEntry("digits", 10, True, 0.875), TaskEntry('signs: "x"', 3, False, None))
    base = BaseModel("hf-hub:timm/ViT-B-16", "0" * 64, "MIT")
    card = model_card(replace(MANIFEST, base=base, tasks=tasks))
    data = huggingface_hub.ModelCard(card).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "onnx", "zero-shot-image-classification")
    assert data.base_model == "timm/ViT-B-16"
    assert data.to_dict()["base_model_relation"] == "finetune"
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in data.eval_results] == [
        ("digits", "accuracy", 0.875)
    ]


@pytest.mark.parametrize(("licence", "said"), [(None, "unknown"), ("Custom: no sale", "other")])
def test_a_licence_that_the_hub_does_not_know_is_said_as_it_is(licence, said) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    card = model_card(replace(MANIFEST, base=BaseModel("builtin:world", "0" * 64, licence)))
    data = huggingface_hub.ModelCard(card).data.to_dict()
    assert data["license"] == said
    assert data.get("license_name") == licence
    assert "base_model" not in data
