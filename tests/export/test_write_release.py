"""A release is a folder that can be used by itself, by the words of its own model card."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from r1export.errors import R1ExportError
from r1export.export.graph import export_graphs
from r1export.export.write_release import ReleaseContent, TaskClasses, write_release
from r1export.update.atomic_io import sha256_file, write_json
from r1export.update.factors import Rows
from r1export.update.golden_samples import GoldenSamples
from r1export.update.release_layout import GRAPHS, UNLISTED
from r1export.update.release_manifest import BaseModel, GoldenGate, MergedUpdate, ReleaseManifest, manifest_digest


@pytest.fixture(scope="module")
def clip(tiny_files):
    from r1export.adapt.clip import load_clip

    return load_clip(weights=tiny_files[0], config=tiny_files[1])


@pytest.fixture(scope="module")
def graphs(clip, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    export_graphs(clip.model, clip.preprocess.size, 12, folder, opset=20)
    return folder


def content_of(clip, **changes) -> ReleaseContent:
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens = clip.tokenize(["red", "blue"])
    with torch.no_grad():
        images, texts = clip.encode_image(pixels).numpy(), clip.encode_text(tokens).numpy()
    values = {
        "name": "01-colours",
        "sequence": 1,
        "base": BaseModel("tiny", "0" * 64),
        "updates": (MergedUpdate("colours", "1" * 64),),
        "weights": clip.parameters(),
        "tasks": (TaskClasses("colours", ("red", "blue"), ("a {} dot",), texts, True),),
        "golden": GoldenSamples(clip.preprocess.normalize(pixels).numpy(), images, tokens.numpy(), texts),
        "preprocess": clip.preprocess.to_json(),
        "tokenizer": clip.tokenizer,
        "graph_digests": dict.fromkeys(GRAPHS, "2" * 64),
        "accuracy": lambda folder: {"colours": 0.0},
        "precision": "fp32",
        "versions": {"r1export": "0"},
        "tolerance": GoldenGate(5e-5, 0.999999),
    }
    return ReleaseContent(**(values | changes))


@pytest.fixture(scope="module")
def release(clip, graphs, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("releases") / "01-colours"
    write_release(content_of(clip), graphs, path)
    return path


def test_the_manifest_lists_every_file_with_its_digest(release) -> None:
    files = ReleaseManifest.read(release).files
    found = {path.relative_to(release).as_posix() for path in release.rglob("*") if path.is_file()}
    assert set(files) == found - set(UNLISTED)
    assert all(sha256_file(release / name) == entry.sha256 for name, entry in files.items())
    assert all((release / name).stat().st_size == entry.nbytes for name, entry in files.items())


def test_the_tensor_map_says_where_every_parameter_lies_byte_by_byte(release, clip) -> None:
    tensors = ReleaseManifest.read(release).tensors
    weights = clip.parameters()
    assert set(tensors) == set(weights)
    for name, entry in tensors.items():
        data = (release / entry.file).read_bytes()[entry.offset : entry.end]
        stored = np.frombuffer(data, "<f4").reshape(entry.shape)
        assert np.array_equal(stored.T if entry.transposed else stored.reshape(weights[name].shape), weights[name])


def test_the_tensor_map_says_which_rows_of_a_packed_parameter_are_adapted(clip, graphs, tmp_path) -> None:
    packed, plain = (
        "visual.transformer.resblocks.0.attn.in_proj_weight",
        "visual.transformer.resblocks.0.mlp.c_fc.weight",
    )
    adapted = (Rows(packed, 64, 96), Rows(packed, 0, 32), Rows(plain, 0, 128))
    write_release(content_of(clip, adapted=adapted), graphs, tmp_path / "release")
    tensors, weights = ReleaseManifest.read(tmp_path / "release").tensors, clip.parameters()
    assert tensors[packed].rows == ((0, 32), (64, 96))
    for name in weights.keys() - {packed}:
        assert tensors[name].rows == (((0, len(weights[name])),) if weights[name].ndim else ()), name


def test_a_manifest_without_rows_is_still_read(release, tmp_path) -> None:
    shutil.copytree(release, tmp_path / "older")
    document = ReleaseManifest.read(release).to_json()
    for entry in document["tensors"].values():
        del entry["rows"]
    write_json(tmp_path / "older" / "manifest.json", document | {"sha256": manifest_digest(document)})
    older, newer = ReleaseManifest.read(tmp_path / "older"), ReleaseManifest.read(release)
    assert older.sha256 == older.digest()
    assert older.tensors == {name: replace(entry, rows=()) for name, entry in newer.tensors.items()}


def test_weights_are_read_by_the_safetensors_library_under_their_own_names(release, clip) -> None:
    names = {
        name for file in ("visual", "textual") for name in safetensors.numpy.load_file(release / f"{file}.safetensors")
    }
    assert names == set(clip.parameters())


def test_other_weights_change_the_weights_and_what_follows_and_no_graph(release, clip, graphs, tmp_path) -> None:
    weights = clip.parameters()
    weights["visual.proj"] = weights["visual.proj"] * 2
    write_release(content_of(clip, weights=weights), graphs, tmp_path / "other")
    one, other = (ReleaseManifest.read(path).files for path in (release, tmp_path / "other"))
    assert {name for name in one if one[name] != other[name]} == {"visual.safetensors", "golden.safetensors"}


def test_the_model_card_shows_an_accuracy_of_exactly_zero(release) -> None:
    assert "| colours | 2 | 0.0 % | yes |" in (release / "README.md").read_text(encoding="utf-8")


def test_a_folder_without_permission_is_refused_and_left_as_it_was(clip, graphs, tmp_path) -> None:
    if os.geteuid() == 0:
        target = Path("/proc/r1export/release")  # root may write anywhere but there
    else:
        (tmp_path / "locked").mkdir(mode=0o500)
        target = tmp_path / "locked" / "release"
    with pytest.raises(R1ExportError, match=r"cannot write .*release: .*(check the path|check disk space)"):
        write_release(content_of(clip), graphs, target)
    assert not target.exists()
