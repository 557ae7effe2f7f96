"""What an application sees is the same in slot and in overlay mode."""

import dataclasses
import shutil

import numpy as np
import pytest
from device import fleet

from r1export.device.version import open_version
from r1export.errors import CheckFailed, InputError
from r1export.update.container import read_tensors


def answers(version, lab, graph):
    golden = read_tensors(lab.release(0) / "golden.safetensors")
    session = version.session(graph)
    names = {item.name for item in session.get_inputs()}
    classes = np.ones((3, 8), "f4")
    return session.run(
        None, {name: value for name, value in {**golden, "class_embeds": classes}.items() if name in names}
    )[0]


@pytest.mark.parametrize("graph", ["visual.onnx", "textual.onnx", "classify.onnx"])
def test_a_session_answers_like_the_labs_release(lab, device, graph):
    import onnxruntime

    device.apply(lab.bundle(2, 0))
    version = open_version(device.path)
    release = dataclasses.replace(version, folder=lab.release(2), files_there=True)
    assert np.array_equal(answers(version, lab, graph), answers(release, lab, graph))
    assert not np.array_equal(answers(version, lab, graph), answers(open_version(device.path, "base"), lab, graph))
    assert onnxruntime.__version__


def test_float16_tensors_are_handed_over_too(half_lab, tmp_path):
    from r1export.device import install, provision

    stores = {mode: tmp_path / mode for mode in ("slot", "overlay")}
    found = []
    for mode, path in stores.items():
        provision.init(path, half_lab.release(0), [half_lab.public], product="camera", device_class="v1", mode=mode)
        install.apply(path, half_lab.bundle(2, 0), now=1_800_000_000)
        found.append(answers(open_version(path), half_lab, "visual.onnx"))
    assert np.array_equal(*found)
    assert np.array_equal(found[0], read_tensors(half_lab.release(2) / "golden.safetensors")["image_embeds"])


def test_an_opened_version_stays_what_it_is_while_the_device_moves_on(lab, device):
    device.apply(lab.bundle(1, 0))
    version = open_version(device.path)
    before = version.read("classes/digits.safetensors")
    device.apply(lab.bundle(2, 1))
    assert version.read("classes/digits.safetensors") == before
    assert open_version(device.path).name == "02-shapes"


def test_the_base_is_a_version_like_any_other(lab, device):
    version = open_version(device.path)
    assert version.name == "base"
    assert version.tensors("visual.safetensors") == {}
    assert device.files() == fleet.hashes(lab.release(0))


def test_a_file_that_is_not_there_is_named_with_those_that_are(lab, device):
    device.apply(lab.bundle(1, 0))
    with pytest.raises(InputError, match=r"no file ../secret"):
        open_version(device.path).read("../secret")


def test_an_overlay_whose_base_rotted_is_refused_at_load(lab, device):
    device.apply(lab.bundle(1, 0))
    victim = device.path / "base" / "visual.safetensors"
    data = bytearray(victim.read_bytes())
    data[-20] ^= 1
    victim.chmod(0o644)
    victim.write_bytes(data)
    if device.store.config.mode == "overlay":
        with pytest.raises(CheckFailed, match=r"visual\.head\.weight"):
            open_version(device.path).session("visual.onnx")
    else:
        answers(open_version(device.path), lab, "visual.onnx")


def test_a_file_that_rotted_is_refused_when_it_is_read(lab, device):
    device.apply(lab.bundle(1, 0))
    store = device.store
    folder = store.folder(store.current if store.config.mode == "slot" else "base")
    victim = folder / "preprocess.json"
    victim.chmod(0o644)
    victim.write_bytes(victim.read_bytes().replace(b"8", b"9"))
    with pytest.raises(CheckFailed, match=r"preprocess\.json has SHA-256"):
        open_version(device.path).read("preprocess.json")


def test_a_graph_that_the_version_does_not_have_is_named(lab, device):
    device.apply(lab.bundle(1, 0))
    with pytest.raises(InputError, match=r"no file other\.onnx"):
        open_version(device.path).session("other.onnx")


def test_a_missing_store_is_named(tmp_path):
    with pytest.raises(InputError, match="create one with `init`"):
        open_version(tmp_path / "nowhere")
    shutil.rmtree(tmp_path)
