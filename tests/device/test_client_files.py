"""A device tries what clients do before the towers: pictures through preprocess.onnx, prompts through the tokenizer."""

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from device import fleet
from running import r1export

from r1export.device import provision
from r1export.device.kit import device_kit
from r1export.export.preprocess import write_preprocess
from r1export.update.atomic_io import sha256_file, write_json
from r1export.update.container import read_tensors, write_tensors
from r1export.update.envelope import SecretKey
from r1export.update.lab.publish import Step, Terms, make_bundle

KEY = SecretKey(bytes(range(32)))


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return fleet.make_run(tmp_path_factory.mktemp("clients") / "run", clients=True)


@pytest.fixture
def run(sound, tmp_path) -> Path:
    """A copy that a test may change, and the key of its updates next to it."""
    (tmp_path / "fleet.pub").write_text(KEY.public.to_pem())
    return Path(shutil.copytree(sound, tmp_path / "run"))


def release(run: Path, number: int) -> Path:
    return next((run / "releases").glob(f"{number:02d}-*"))


def reseal(folder: Path) -> None:
    """Make the digests of the manifest fit what is there now."""
    document = json.loads((folder / "manifest.json").read_text())
    for path, entry in document["files"].items():
        entry |= {"sha256": sha256_file(folder / path), "bytes": (folder / path).stat().st_size}
    write_json(folder / "manifest.json", document)


def init(run: Path, *options: str):
    trust = run.parent / "fleet.pub"
    return r1export("device", "init", run.parent / "store", "--base", release(run, 0), "--trust", trust, *options)


def apply(run: Path):
    """Install release 1 on a new device."""
    made = init(run)
    assert made.returncode == 0, made.output
    return r1export("device", "apply", run.parent / "store", update(run))


def update(run: Path) -> Path:
    path = run.parent / "update.r1u"
    path.write_bytes(make_bundle(run, Step(1), [KEY], Terms(1_700_000_000)).to_bytes())
    return path


@pytest.mark.parametrize("mode", ["slot", "overlay"])
def test_a_sound_version_is_installed_and_doctor_has_nothing_to_say(run, mode) -> None:
    assert init(run, "--mode", mode).returncode == 0
    assert r1export("device", "apply", run.parent / "store", update(run)).returncode == 0
    looked = r1export("device", "doctor", run.parent / "store")
    assert (looked.returncode, "tokenizer" in looked.output) == (0, False), looked.output


def test_the_kit_tries_them_too(run, tmp_path) -> None:
    kit = device_kit(tmp_path / "r1device.pyz")
    tokenizer_with(run, 1, "one", "two")
    for verb, code in (
        (("init", tmp_path / "store", "--base", release(run, 0), "--trust", tmp_path / "fleet.pub"), 0),
        (("apply", tmp_path / "store", update(run)), 1),
    ):
        done = subprocess.run([sys.executable, kit, *map(str, verb)], capture_output=True, text=True)
        assert done.returncode == code, done.stderr
    assert "tokenizer.json: wrong input_ids" in done.stderr


def tokenizer_with(run: Path, number: int, left: str, right: str) -> None:
    """Exchange two entries of the vocabulary."""
    path = release(run, number) / "tokenizer/tokenizer.json"
    document = json.loads(path.read_text())
    vocab = document["model"]["vocab"]
    vocab[left], vocab[right] = vocab[right], vocab[left]
    path.write_text(json.dumps(document))
    reseal(path.parents[1])


@pytest.mark.parametrize(
    "changed", [{"mean": [0.0, 0.46, 0.41]}, {"interpolation": "bilinear"}, {"std": [0.27, 0.26, 0.29]}], ids=str
)
def test_a_base_whose_preprocessing_is_not_the_labs_makes_no_store(run, changed) -> None:
    base = release(run, 0)
    write_preprocess(fleet.CONFIG | changed, base / "preprocess.onnx", opset=19)
    reseal(base)
    done = init(run)
    assert (done.returncode, "health check of preprocess.onnx: image" in done.output) == (1, True), done.output
    assert not (run.parent / "store").exists()


@pytest.mark.parametrize(
    "config", [{"size": 8}, {"scale": 1 / 255, "std": []}, {"scale": 1 / 255, "std": [0, 1, 1]}], ids=str
)
def test_a_config_that_is_none_is_bad_input(run, config) -> None:
    write_json(release(run, 0) / "preprocess.json", config)
    reseal(release(run, 0))
    done = init(run)
    assert (done.returncode, "preprocess.json" in done.output) == (2, True), done.output


def test_a_graph_of_another_size_fails(run) -> None:
    write_preprocess(fleet.CONFIG | {"size": [16, 16]}, release(run, 0) / "preprocess.onnx", opset=19)
    reseal(release(run, 0))
    done = init(run)
    assert (done.returncode, "pixel_values (1, 3, 16, 16), expected (1, 3, 8, 8)" in done.output) == (1, True)


def change_golden(run: Path, **tensors: np.ndarray) -> None:
    path = release(run, 1) / "golden.safetensors"
    write_tensors(path, read_tensors(path) | tensors)
    reseal(path.parent)


def test_an_update_with_another_picture_than_its_pixels_is_taken_back(run) -> None:
    picture = read_tensors(release(run, 1) / "golden.safetensors")["picture_2"]
    change_golden(run, picture_2=255 - picture)
    done = apply(run)
    assert (done.returncode, "preprocess.onnx: image 2 differs by up to" in done.output) == (1, True), done.output
    assert (run.parent / "store/current").resolve().name == "base"


@pytest.mark.parametrize(("values", "bytes_off", "words"), [(1, 1.8, "up to 1."), (3 * 64, 0.6, "average")])
def test_one_pixel_that_is_far_off_and_many_that_are_a_little_off_are_noticed(run, values, bytes_off, words) -> None:
    pixels = read_tensors(release(run, 1) / "golden.safetensors")["pixel_values"].copy()
    pixels[0].reshape(-1)[:values] += np.float32(bytes_off / 255 / min(fleet.CONFIG["std"]))
    change_golden(run, pixel_values=pixels)
    fleet.refresh(release(run, 1))
    reseal(release(run, 1))
    done = apply(run)
    assert (done.returncode, "preprocess.onnx: image 0 differs" in done.output) == (1, True), done.output
    assert words in done.output


def test_more_pictures_than_pixels_fail(run) -> None:
    change_golden(run, **{f"picture_{i}": np.zeros((8, 8, 3), np.uint8) for i in range(3, 7)})
    done = apply(run)
    assert (done.returncode, "more images than pixel_values" in done.output) == (1, True), done.output


def test_an_update_with_two_words_exchanged_is_taken_back(run) -> None:
    tokenizer_with(run, 1, "one", "two")
    done = apply(run)
    assert (done.returncode, "wrong input_ids, first for 'a photo of one'" in done.output) == (1, True), done.output
    assert (run.parent / "store/current").resolve().name == "base"


@pytest.mark.parametrize("text", ["garbage", "{}"])
def test_a_tokenizer_that_is_none_fails(run, text) -> None:
    (release(run, 1) / "tokenizer/tokenizer.json").write_text(text)
    reseal(release(run, 1))
    done = apply(run)
    assert (done.returncode, "cannot load tokenizer/tokenizer.json" in done.output) == (1, True), done.output


def test_fewer_prompts_than_input_ids_fail(run) -> None:
    change_golden(run, prompts=np.frombuffer(json.dumps(fleet.PROMPTS[:2]).encode(), np.uint8))
    done = apply(run)
    assert (done.returncode, "wrong input_ids, first for '2 of 4 prompts'" in done.output) == (1, True), done.output


def test_where_tokenizers_is_not_installed_doctor_says_so_and_nothing_fails(run, tmp_path) -> None:
    venv.create(tmp_path / "venv", symlinks=True, with_pip=False)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    for package in (np, onnxruntime):
        path = Path(package.__file__).parent
        for part in path.parent.glob(f"{path.name}*"):
            (packages / part.name).symlink_to(part)
    tokenizer_with(run, 1, "one", "two")  # not noticed there
    provision.init(tmp_path / "store", release(run, 0), [tmp_path / "fleet.pub"])
    kit, python = device_kit(tmp_path / "r1device.pyz"), tmp_path / "venv/bin/python"
    for verb in (("apply", tmp_path / "store", update(run)), ("doctor", tmp_path / "store")):
        done = subprocess.run([python, kit, *map(str, verb)], capture_output=True, text=True, env={})
        assert done.returncode == 0, done.stderr
    note = "-    tokenizer: not checked: the package tokenizers is not installed"
    assert done.stdout.splitlines()[-1] == note
