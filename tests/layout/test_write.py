"""What lies in a layout, and what cannot be made one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from running import r1export

from r1export.errors import InputError
from r1export.layout.table import LAYOUTS
from r1export.layout.write import read_source, write_layout
from r1export.update.atomic_io import sha256_file
from r1export.update.container import read_tensors
from r1export.update.layout_file import LAYOUT, LayoutFile
from r1export.update.release_manifest import ReleaseManifest

CARRIED = [name for name in LAYOUTS if name != "immich"]  # whose list has no model with 128 numbers


@pytest.mark.parametrize("name", CARRIED)
def test_weights_are_the_release_s_own_files_and_layout_json_lists_every_other(lab, tmp_path, name) -> None:
    release, out = lab.release(1), tmp_path / "out"
    written = write_layout(read_source(release, variants=False), name, out)
    layout = LayoutFile.read(out)
    assert layout == written.layout
    assert layout.origin.sha256 == sha256_file(release / "manifest.json")
    assert layout.embedding_space == ReleaseManifest.read(release).embedding_space
    for path, source in layout.files.items():
        assert (out / path).samefile(release / source)
    for path, digest in layout.made.items():
        assert sha256_file(out / path) == digest
    there = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert there == {*layout.paths, LAYOUT}
    assert written.shared == len(layout.files)


def test_where_links_are_refused_the_bytes_are_copied(lab, tmp_path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    written = write_layout(read_source(lab.release(1), variants=False), "fastembed", tmp_path / "out")
    assert written.shared == 0
    copy, original = tmp_path / "out/image/visual.safetensors", lab.release(1) / "visual.safetensors"
    assert not copy.samefile(original)
    assert sha256_file(copy) == sha256_file(original)
    assert written.added > original.stat().st_size


@pytest.mark.parametrize("name", CARRIED)
def test_two_releases_of_one_base_have_the_same_graphs(lab, tmp_path, name) -> None:
    for number in (0, 1):
        write_layout(read_source(lab.release(number), variants=False), name, tmp_path / str(number))
    one, other = (LayoutFile.read(tmp_path / str(number)).made for number in (0, 1))
    graphs = [path for path in one if path.endswith(".onnx")]
    assert {path: one[path] for path in graphs} == {path: other[path] for path in graphs}


def test_every_file_that_a_graph_names_lies_next_to_it(lab, tmp_path) -> None:
    source = read_source(lab.release(1), variants=True)
    for name in CARRIED:
        write_layout(source, name, tmp_path / name)
    graphs = [path for path in tmp_path.rglob("*.onnx") if path.parent.parent.name != "blobs"]
    assert len(graphs) > 10
    for path in graphs:
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            for entry in tensor.external_data:
                assert entry.key != "location" or (path.parent / entry.value).is_file()


def test_transformersjs_has_the_variants_that_the_run_has(lab, tmp_path) -> None:
    written = write_layout(read_source(lab.release(1), variants=True), "transformersjs", tmp_path / "out")
    assert set(written.layout.variants) == {"fp16", "int8"}
    config = json.loads((tmp_path / "out/config.json").read_text())["transformers.js_config"]
    assert config["use_external_data_format"]["model_quantized.onnx"] == 2
    quantized = tmp_path / "out/onnx/text_model_quantized.onnx_data"
    assert quantized.samefile(lab.run / "variants/int8/releases/01-digits/textual.safetensors")


def test_open_clip_weights_are_those_of_the_model(lab, tmp_path) -> None:
    from running import context_of

    write_layout(read_source(lab.release(0), variants=False), "openclip", tmp_path / "out")
    stored = read_tensors(tmp_path / "out/open_clip_model.safetensors")
    expected = context_of(lab.run).clip.parameters()
    assert stored.keys() == expected.keys()
    assert all(np.array_equal(stored[name], expected[name]) for name in stored)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--to", "torchserve"), 2, "unknown layout 'torchserve'"),
        (("--to", "immich"), 3, "immich has no model with 128-dimensional embeddings"),
        ((), 2, "unknown layout ''"),
    ],
)
def test_a_layout_that_cannot_be_made_is_one_line(lab, tmp_path, arguments, code, message) -> None:
    done = r1export("layout", lab.release(1), tmp_path / "out", *arguments)
    assert done.returncode == code
    assert done.stderr.startswith(f"Error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_left_alone(lab, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    done = r1export("layout", lab.release(1), tmp_path / "out", "--to", "fastembed")
    assert done.returncode == 2
    assert "out exists" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_a_damaged_release_makes_no_layout(lab, tmp_path) -> None:
    spoiled = Path(shutil.copytree(lab.release(1), tmp_path / "release"))
    with (spoiled / "visual.safetensors").open("r+b") as file:
        file.seek(100_000)
        file.write(b"\x00\x01\x02\x03")
    done = r1export("layout", spoiled, tmp_path / "out", "--to", "fastembed")
    assert done.returncode == 1
    assert "visual.safetensors is damaged" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_failure_halfway_leaves_nothing(lab, tmp_path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("r1export.layout.write.write_open_clip_weights", fail)
    done = r1export("layout", lab.release(1), tmp_path / "out", "--to", "openclip")
    assert done.returncode == 3
    assert "No space left on device" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_int8_release_is_no_model_of_open_clip(lab, tmp_path) -> None:
    done = r1export("layout", lab.run / "variants/int8/releases/01-digits", tmp_path / "out", "--to", "openclip")
    assert done.returncode == 3
    assert "01-digits is int8" in done.stderr


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "con"])
def test_layout_json_names_no_file_outside_of_its_folder(lab, tmp_path, path) -> None:
    written = write_layout(read_source(lab.release(1), variants=False), "fastembed", tmp_path / "out")
    document = json.loads(written.layout.to_bytes())
    document["files"][path] = "visual.safetensors"
    with pytest.raises(InputError):
        LayoutFile.parse(json.dumps(document).encode(), "layout.json")


def test_layout_json_reads_back_as_it_was_written(lab, tmp_path) -> None:
    written = write_layout(read_source(lab.release(1), variants=True), "transformersjs", tmp_path / "out")
    assert LayoutFile.parse(written.layout.to_bytes(), "layout.json") == written.layout
