"""A layout on a device: it follows the current version, whatever becomes of that."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from device.steps import in_this_process
from layout.conftest import run_client

from r1export.device import doctor, install, provision
from r1export.device.kit import device_kit
from r1export.errors import CheckFailed, InputError
from r1export.layout.write import check_layout_files, read_source, write_layout
from r1export.update.atomic_io import sha256_file
from r1export.update.layout_file import LayoutFile
from r1export.update.release_manifest import ReleaseManifest
from r1export.verify.results import Verdict

KINDS = ("transformersjs", "fastembed", "openclip", "ortpackage", "triton", "ovms", "oci")


@pytest.fixture
def device(lab, tmp_path):
    """A store at the base release with a layout of each kind, in the folder it gives: STORE is in `store`."""
    source = read_source(lab.release(0), variants=False)
    folders = [write_layout(source, kind, tmp_path / kind).path for kind in KINDS]
    provision.init(tmp_path / "store", lab.release(0), [lab.public], health="none", layout=folders)
    return tmp_path


def apply(lab, device: Path) -> install.Outcome:
    return install.apply(device / "store", lab.update, run=in_this_process)


def state(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in folder.rglob("*") if path.is_file()}


def test_a_new_device_s_layouts_are_those_of_the_base(lab, device, tmp_path) -> None:
    fresh = write_layout(read_source(lab.release(0), variants=False), "fastembed", tmp_path / "fresh").path
    assert (device / "fastembed").is_symlink()
    assert state(device / "fastembed") == state(fresh)
    assert sorted(path.name for path in device.glob(".*")) == []


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_brings_the_client_the_new_version(lab, device, kind) -> None:
    apply(lab, device)
    result = run_client(device / kind, kind)
    assert result.check.verdict is Verdict.PASS, result.check.detail
    layout = LayoutFile.read(device / kind)
    assert (layout.origin.kind, layout.origin.name) == ("update", "01-digits")


def test_after_an_update_the_folder_is_that_of_the_release_but_for_its_origin(lab, device, tmp_path) -> None:
    apply(lab, device)
    for kind in KINDS[:-1]:
        fresh = write_layout(read_source(lab.release(1), variants=False), kind, tmp_path / "fresh" / kind).path
        found, expected = state(device / kind), state(fresh)
        own = {"layout.json", "manifest.json"}  # a package's own manifest.json states the version it was made from
        assert {path: found[path] for path in found.keys() - own} == {
            path: expected[path] for path in expected.keys() - own
        }
        assert LayoutFile.read(device / kind).embedding_space == LayoutFile.read(fresh).embedding_space


def test_weights_take_no_space_twice(lab, device) -> None:
    apply(lab, device)
    current = device / "store/current"
    assert (current / "layouts/fastembed/image/visual.safetensors").samefile(current / "visual.safetensors")


def test_a_rollback_brings_back_the_folder(lab, device) -> None:
    before = state(device / "openclip")
    apply(lab, device)
    assert state(device / "openclip") != before
    install.rollback(device / "store", run=in_this_process)
    assert state(device / "openclip") == before


def test_a_client_that_opened_the_folder_keeps_its_version(lab, device) -> None:
    opened = (device / "fastembed").resolve()
    before = state(opened)
    apply(lab, device)
    assert state(opened) == before
    assert state(device / "fastembed") != before


def test_a_failure_while_layouts_are_made_leaves_the_old_version(lab, device, monkeypatch) -> None:
    before = {kind: state(device / kind) for kind in KINDS}

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("r1export.device.layouts.write_open_clip_weights", fail)
    with pytest.raises(Exception, match="No space left on device"):
        apply(lab, device)
    assert {kind: state(device / kind) for kind in KINDS} == before
    assert not list((device / "store/slots").iterdir())
    monkeypatch.undo()
    assert apply(lab, device).changed


@pytest.mark.parametrize("path", ["openclip/open_clip_model.safetensors", "triton/clip_visual/1/model.onnx"])
def test_damage_is_found_and_repaired_by_the_same_update(lab, device, path) -> None:
    apply(lab, device)
    whole = state(device / "store/current")
    target = device / path
    data = target.read_bytes()
    target.unlink()
    target.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert any("is damaged" in finding.fault for finding in doctor.doctor(device / "store"))
    assert apply(lab, device).changed
    assert state(device / "store/current") == whole
    assert not any(finding.fault for finding in doctor.doctor(device / "store"))


def test_damaged_weights_are_repaired_in_the_layout_too(lab, device) -> None:
    apply(lab, device)
    whole = state(device / "store/current")
    weights = device / "store/current/visual.safetensors"
    with weights.open("r+b") as file:  # one file with that of the layouts
        file.seek(50_000)
        file.write(b"\x01\x02\x03\x04")
    assert apply(lab, device).changed
    assert state(device / "store/current") == whole
    assert (device / "fastembed/image/visual.safetensors").samefile(weights)


def test_an_oci_layout_gets_the_update_as_a_referrer(lab, device) -> None:
    before = json.loads((device / "oci/index.json").read_text())["manifests"]
    apply(lab, device)
    base, update = json.loads((device / "oci/index.json").read_text())["manifests"]
    assert [base] == before
    manifest = json.loads((device / "oci/blobs/sha256" / update["digest"][7:]).read_text())
    assert manifest["subject"]["digest"] == base["digest"]
    assert manifest["layers"][0]["digest"][7:] == sha256_file(lab.update)


def test_the_kit_does_the_same_with_numpy_alone(lab, tmp_path) -> None:
    kit = device_kit(tmp_path / "r1device.pyz")
    folder = write_layout(read_source(lab.release(0), variants=False), "openclip", tmp_path / "openclip").path

    def run(*arguments: object) -> None:
        command = [sys.executable, "-I", "-W", "ignore", str(kit), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr

    trust = ("--base", lab.release(0), "--trust", lab.public, "--health", "none")
    run("init", tmp_path / "store", *trust, "--layout", folder)
    run("apply", tmp_path / "store", lab.update)
    fresh = write_layout(read_source(lab.release(1), variants=False), "openclip", tmp_path / "fresh").path
    name = "open_clip_model.safetensors"
    assert sha256_file(folder / name) == sha256_file(fresh / name)
    assert check_layout_files(folder).embedding_space == ReleaseManifest.read(lab.release(1)).embedding_space


def test_a_layout_of_another_release_or_with_variants_is_refused(lab, tmp_path) -> None:
    later = write_layout(read_source(lab.release(1), variants=False), "triton", tmp_path / "later").path
    mixed = write_layout(read_source(lab.release(0), variants=True), "transformersjs", tmp_path / "mixed").path
    for folder, what in ((later, "of release 01-digits"), (mixed, "with variants")):
        with pytest.raises(InputError, match=what):
            provision.init(tmp_path / "store", lab.release(0), [lab.public], health="none", layout=[folder])
    assert not (tmp_path / "store").exists()
    assert not later.is_symlink()


def test_an_overlay_store_has_no_files_for_a_layout(lab, tmp_path) -> None:
    folder = write_layout(read_source(lab.release(0), variants=False), "triton", tmp_path / "triton").path
    with pytest.raises(InputError, match="use --mode slot"):
        provision.init(tmp_path / "store", lab.release(0), [lab.public], health="none", mode="overlay", layout=[folder])


def test_a_layout_that_was_edited_is_not_taken(lab, tmp_path) -> None:
    folder = write_layout(read_source(lab.release(0), variants=False), "triton", tmp_path / "triton").path
    config = next(folder.glob("*/config.pbtxt"))
    config.write_text(config.read_text() + "\n# edited\n")
    with pytest.raises(CheckFailed, match="is damaged"):
        provision.init(tmp_path / "store", lab.release(0), [lab.public], health="none", layout=[folder])
