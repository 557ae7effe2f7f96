"""What clients read next to the graphs, tried on real pictures and prompts."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
from open_clip.transform import PreprocessCfg
from PIL import Image

from r1export.adapt.clip import Preprocess
from r1export.errors import CheckFailed, InputError
from r1export.export.preprocess import write_preprocess
from r1export.export.tokenizer import write_tokenizer
from r1export.update.atomic_io import write_json
from r1export.update.golden_samples import PICTURES, SAMPLES, GoldenSamples
from r1export.verify.client_files import ListedClasses, PreprocessConfig, check_preprocess, check_tokenizer
from r1export.verify.results import Check

SIZES = ((41, 30), (30, 41), (64, 64))
PROMPTS = ("a photo of a cat.", "ein Käfer 🐞 auf 花卉", "A “DOG”", "x " * 200, "three", "four", "five", "six")


def picture(height: int, width: int) -> np.ndarray:
    """A smooth picture with edges, as photographs are."""
    rng = np.random.default_rng(height)
    coarse = Image.fromarray(rng.integers(0, 255, (5, 5, 3), np.uint8))
    return np.array(coarse.resize((width, height), Image.Resampling.BICUBIC), np.uint8)


def preprocess(size: tuple[int, int] = (24, 24), **options) -> Preprocess:
    return Preprocess(PreprocessCfg(size=size, **options))


def golden_of(lab: Preprocess) -> GoldenSamples:
    import torch

    pictures = tuple(picture(*size) for size in SIZES)
    crops = np.stack([lab.crop(Image.fromarray(one)) for one in pictures])
    values = lab.normalize(torch.from_numpy(crops)).numpy()
    tokens = open_clip.get_tokenizer("ViT-B-32")(list(PROMPTS)).numpy()
    return GoldenSamples(values, np.zeros((3, 4)), tokens, np.zeros((SAMPLES, 4)), pictures, PROMPTS)


def preprocessing(release: Path, golden: GoldenSamples, *, graph_required: bool = False) -> Check:
    return check_preprocess(release, golden, graph_required)


@pytest.fixture
def release(tmp_path: Path) -> Path:
    lab = preprocess()
    write_json(tmp_path / "preprocess.json", lab.to_json())
    write_preprocess(lab.to_json(), tmp_path / "preprocess.onnx", opset=20)
    write_tokenizer(open_clip.get_tokenizer("ViT-B-32"), tmp_path / "tokenizer")
    return tmp_path


@pytest.mark.parametrize(
    "lab",
    [
        preprocess(),
        preprocess(interpolation="bilinear"),
        preprocess(resize_mode="squash"),
        preprocess(size=(24, 32), resize_mode="squash"),
        preprocess(size=(24, 32)),
        preprocess(size=(24, 32), interpolation="bilinear"),
        preprocess(resize_mode="longest", fill_color=7),
        preprocess(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    ],
    ids=lambda lab: f"{lab.config.resize_mode}-{lab.config.interpolation}-{lab.config.size}-{lab.config.mean[0]:.2f}",
)
def test_preprocess_json_alone_says_all_that_open_clip_does(lab: Preprocess, tmp_path: Path) -> None:
    write_json(tmp_path / "preprocess.json", lab.to_json())
    golden = golden_of(lab)
    config = PreprocessConfig.read(tmp_path)
    for one, expected in zip(golden.pictures, golden.pixel_values, strict=True):
        assert np.abs(config.apply(one) - expected).max() < 1e-5
    check = preprocessing(tmp_path, golden)
    assert (check.verdict, check.looked_at, check.of) == ("pass", PICTURES, PICTURES)


def test_the_files_of_a_sound_release_pass(release: Path) -> None:
    golden = golden_of(preprocess())
    assert (preprocessing(release, golden).verdict, preprocessing(release, golden).of) == ("pass", 2 * PICTURES)
    check = check_tokenizer(release, golden)
    assert (check.verdict, check.looked_at, check.of) == ("pass", SAMPLES, SAMPLES)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mean", [0.0, 0.0, 0.0]),
        ("std", [1.0, 1.0, 1.0]),
        ("mean", [0.40821073, 0.4578275, 0.48145466]),
        ("interpolation", "bilinear"),
        ("resize_mode", "squash"),
        ("size", [32, 32]),
        ("scale", 1.0),
    ],
)
def test_another_value_in_preprocess_json_is_found(release: Path, field: str, value: object) -> None:
    document = json.loads((release / "preprocess.json").read_text())
    write_json(release / "preprocess.json", document | {field: value})
    check = preprocessing(release, golden_of(preprocess()))
    assert check.verdict == "fail"
    assert "preprocess.json" in check.detail


@pytest.mark.parametrize(
    "change", [{"layout": "NHWC"}, {"mean": [0, 0]}, {"std": ["a"] * 3}, {"more": 1}, {"size": [24.5, 24]}]
)
def test_a_preprocess_json_that_is_none_is_refused(release: Path, change: dict) -> None:
    whole = json.loads((release / "preprocess.json").read_text())
    for document in ([], {}, whole | change):
        write_json(release / "preprocess.json", document)
        with pytest.raises(InputError, match=r"preprocess\.json"):
            PreprocessConfig.read(release)


def test_another_preprocess_graph_is_found(release: Path) -> None:
    other = preprocess(mean=(0.0, 0.0, 0.0))
    write_preprocess(other.to_json(), release / "preprocess.onnx", opset=20)
    check = preprocessing(release, golden_of(preprocess()))
    assert check.verdict == "fail"
    assert "preprocess.onnx: image 0 differs" in check.detail


def test_a_preprocess_graph_that_has_to_be_there_and_is_not_is_found(release: Path) -> None:
    (release / "preprocess.onnx").unlink()
    golden = golden_of(preprocess())
    assert preprocessing(release, golden).verdict == "pass"
    with pytest.raises(CheckFailed, match=r"preprocess\.onnx"):
        preprocessing(release, golden, graph_required=True)


def edit_vocabulary(folder: Path, change: Callable[[dict], dict], files: tuple[str, ...]) -> None:
    if "tokenizer.json" in files:
        document = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        document["model"]["vocab"] = change(document["model"]["vocab"])
        write_json(folder / "tokenizer.json", document)
    if "vocab.json" in files:
        write_json(folder / "vocab.json", change(json.loads((folder / "vocab.json").read_text("utf-8"))))


@pytest.mark.parametrize("files", [("tokenizer.json",), ("vocab.json",), ("tokenizer.json", "vocab.json")])
def test_two_entries_of_the_vocabulary_that_were_exchanged_are_found(release: Path, files: tuple[str, ...]) -> None:
    """Entries that no golden prompt uses."""
    used = set(golden_of(preprocess()).input_ids.ravel().tolist())
    vocab = json.loads((release / "tokenizer" / "vocab.json").read_text("utf-8"))
    first, second = [name for name, i in vocab.items() if i not in used and 20_000 < i < 40_000][:2]
    edit_vocabulary(release / "tokenizer", lambda v: v | {first: v[second], second: v[first]}, files)
    assert check_tokenizer(release, golden_of(preprocess())).verdict == "fail"


def test_a_tokenizer_that_gives_other_ids_is_found_and_the_prompt_named(release: Path) -> None:
    document = json.loads((release / "tokenizer" / "tokenizer.json").read_text("utf-8"))
    document["normalizer"]["normalizers"].remove({"type": "Lowercase"})
    write_json(release / "tokenizer" / "tokenizer.json", document)
    check = check_tokenizer(release, golden_of(preprocess()))
    assert check.verdict == "fail"
    assert "wrong input_ids, first for 'ein Käfer 🐞 auf 花卉'" in check.detail


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_fewer_pictures_or_prompts_than_every_release_has_do_not_pass(release: Path, kept: int) -> None:
    golden = golden_of(preprocess())
    few = replace(
        golden, pictures=golden.pictures[:kept], prompts=golden.prompts[:kept], input_ids=golden.input_ids[:kept]
    )
    assert preprocessing(release, few).verdict == "inconclusive"
    assert check_tokenizer(release, few).verdict == "inconclusive"


def test_classes_are_listed_strictly(tmp_path: Path) -> None:
    whole = {"task": "t", "classes": ["a", "b"], "templates": ["{}."], "learned": True}
    write_json(tmp_path / "t.json", whole)
    assert ListedClasses.read(tmp_path / "t.json").prompts == ["a.", "b."]
    for broken in ({"classes": "ab"}, {"classes": [1]}, {"learned": "yes"}, {"extra": 1}):
        write_json(tmp_path / "t.json", whole | broken)
        with pytest.raises(InputError, match=r"t\.json"):
            ListedClasses.read(tmp_path / "t.json")
