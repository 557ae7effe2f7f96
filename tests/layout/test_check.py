"""Layouts in the programs that they are for: the real clients, and a stand-in for the one that is a server."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from layout.conftest import NODE, run_client
from running import r1export, trained_run

from r1export.errors import CheckFailed
from r1export.layout.check import judge, labels
from r1export.layout.write import check_layout_files, read_source, write_layout
from r1export.update.container import read_tensors
from r1export.update.golden_samples import GoldenSamples
from r1export.verify.results import Verdict


@pytest.fixture
def made(lab, tmp_path):
    """Makes a layout of the trained release."""

    def make(name: str) -> Path:
        return write_layout(read_source(lab.release(1), variants=False), name, tmp_path / name).path

    return make


def test_transformersjs_embeds_and_classifies_as_the_release_does(made) -> None:
    result = run_client(made("transformersjs"), "transformersjs")
    assert result.check.verdict is Verdict.PASS, result.check.detail
    assert max(result.differences[name] for name in ("image", "text", "short_text")) < 1e-5
    assert (result.same_top1, result.classified) == (3, 3)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("fastembed", {"picture", "text"}),
        ("ortpackage", {"image", "text", "short_text"}),
        ("triton", {"image", "text", "short_text"}),
        ("ovms", {"image", "text", "short_text"}),
        ("oci", {"image", "text"}),
        ("openclip", {"image", "picture", "text"}),
    ],
)
def test_the_client_gives_the_golden_embeddings(made, name, what) -> None:
    result = run_client(made(name), name)
    assert result.check.verdict is Verdict.PASS, result.check.detail
    assert set(result.differences) == what
    assert max(result.differences.values()) < 1e-5


def test_weights_of_another_release_fail_the_check(lab, made) -> None:
    weights = made("fastembed") / "image/visual.safetensors"
    weights.unlink()
    shutil.copy(lab.release(0) / "visual.safetensors", weights)
    result = run_client(weights.parents[1], "fastembed")
    assert result.check.verdict is Verdict.FAIL
    assert "embeddings differ by" in result.check.detail


def test_a_graph_that_was_edited_is_found_before_any_client_runs(made) -> None:
    folder = made("triton")
    path = next(folder.glob("*/1/model.onnx"))
    path.write_bytes(path.read_bytes() + b"\x00")
    with pytest.raises(CheckFailed, match="is damaged"):
        run_client(folder, "openclip")


def test_a_client_that_is_not_there_is_one_line(made, tmp_path) -> None:
    done = r1export("layout", made("transformersjs"), "--check", "--node-modules", tmp_path, "--json")
    assert done.returncode == 3
    assert "npm install @huggingface/transformers" in json.loads(done.stdout)["error"]["remedy"]


def test_the_command_checks_what_it_made(lab, tmp_path) -> None:
    done = r1export("layout", lab.release(1), tmp_path / "out", "--to", "openclip", "--check", "--json")
    assert done.returncode == 0, done.output
    document = json.loads(done.stdout)
    assert document["verdict"] == "pass"
    assert document["max_abs"]["image"] < 1e-6


def test_what_is_no_layout_cannot_be_checked(tmp_path) -> None:
    done = r1export("layout", tmp_path, "--check")
    assert done.returncode == 2
    assert "is not a layout" in done.stderr


def test_the_folder_of_open_clip_is_the_base_of_a_new_run(made, tmp_path) -> None:
    folder = made("openclip")
    recipe = f'[base]\nmodel = "local-dir:{folder}"\n[[tasks]]\nname = "digits"\nsource = "builtin:digits"\n'
    run = trained_run(tmp_path, recipe)
    base = next((run / "releases").glob("00-*"))
    ours = json.loads((folder.parent / "openclip/layout.json").read_text())
    space = json.loads((base / "manifest.json").read_text())["embedding_space"]
    assert space["image"] == ours["embedding_space"]["image"]


@pytest.fixture(scope="session")
def wide_run(tmp_path_factory) -> Path:
    """A run of a tiny model whose embeddings have 512 numbers, as the photo server's models have."""
    import open_clip
    import torch
    from conftest import TINY
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("wide")
    (folder / "base").mkdir()
    config = TINY | {"embed_dim": 512}
    document = {"model_cfg": config, "preprocess_cfg": {}}
    (folder / "base/open_clip_config.json").write_text(json.dumps(document), encoding="utf-8")
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**config).state_dict(), folder / "base/open_clip_model.safetensors")
    recipe = f'[base]\nmodel = "local-dir:{folder / "base"}"\n[[tasks]]\nname = "digits"\nsource = "builtin:digits"\n'
    return trained_run(folder, recipe + "[train]\nlearning_rate = 5e-3\n[pool]\nalpha = 12.0\n")


def test_the_stand_in_for_immich_gives_the_golden_embeddings(wide_run, tmp_path) -> None:
    source = read_source(next((wide_run / "releases").glob("01-*")), variants=False)
    written = write_layout(source, "immich", tmp_path / "out")
    assert (tmp_path / "out/clip/ViT-B-32__openai/textual/model.onnx").is_file()
    assert any("Smart Search" in note for note in written.notes)
    result = run_client(tmp_path / "out", "immich")
    assert result.check.verdict is Verdict.PASS, result.check.detail
    assert result.client.startswith("stand-in for immich")


def test_a_name_that_the_photo_server_does_not_know_is_refused(wide_run, tmp_path) -> None:
    release = next((wide_run / "releases").glob("01-*"))
    done = r1export("layout", release, tmp_path / "out", "--to", "immich", "--name", "ViT-L-14__openai")
    assert done.returncode == 2
    assert "choose ViT-B-32__openai" in done.stderr


def test_transformersjs_takes_a_siglip(family_run, tmp_path) -> None:
    release = next((family_run("SigLIP2") / "releases").glob("01-*"))
    folder = write_layout(read_source(release, variants=False), "transformersjs", tmp_path / "siglip").path
    assert json.loads((folder / "config.json").read_text())["model_type"] == "siglip"
    result = run_client(folder, "transformersjs")
    assert result.check.verdict is Verdict.PASS, result.check.detail


@pytest.mark.skipif("R1EXPORT_CLIENTS" not in os.environ, reason="set R1EXPORT_CLIENTS=required where they have to run")
def test_the_required_clients_are_installed() -> None:
    assert (NODE / "node_modules/@huggingface/transformers").is_dir()


@pytest.fixture
def judged(made):
    """What `judge` says of an answer that is the golden samples with some members changed."""
    folder = made("transformersjs")
    layout, golden = check_layout_files(folder), GoldenSamples.from_tensors(read_tensors(folder / "golden.safetensors"))
    names = labels(golden)
    rows = [golden.prompts.index(name) for name in names]
    pictures = golden.image_embeds[: len(golden.pictures)]
    best = (pictures @ golden.text_embeds[rows].T).argmax(1).tolist()
    sound = {
        "client": "a client", "image_embeds": golden.image_embeds.tolist(), "text_embeds": golden.text_embeds.tolist(),
        "resized_picture_embeds": pictures.tolist(), "top1": best,
    }  # fmt: skip
    worst = (pictures @ golden.text_embeds[rows].T).argmin(1).tolist()

    def judge_with(leave_out: tuple[str, ...] = (), **changes):
        answer = {name: value for name, value in (sound | changes).items() if name not in leave_out}
        return judge(layout, golden, answer).check

    return judge_with, worst


def test_golden_embeddings_and_answers_pass_and_nothing_does_not(judged) -> None:
    judge_with, _ = judged
    assert judge_with().verdict is Verdict.PASS
    everything = ("image_embeds", "text_embeds", "resized_picture_embeds", "top1")
    assert judge_with(leave_out=everything).verdict is not Verdict.PASS


def test_other_answers_fail_whether_or_not_the_client_shows_its_embeddings(judged) -> None:
    judge_with, worst = judged
    assert judge_with(top1=worst).verdict is Verdict.FAIL
    assert judge_with(leave_out=("resized_picture_embeds",), top1=worst).verdict is Verdict.FAIL


def test_embeddings_that_are_not_finite_or_of_another_shape_fail(judged) -> None:
    judge_with, _ = judged
    assert judge_with(text_embeds=[[float("nan")]]).verdict is Verdict.FAIL
    assert judge_with(resized_picture_embeds=[[1.0]]).verdict is Verdict.FAIL
