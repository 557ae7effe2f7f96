"""Making updates: only what a device lacks, only what can be derived, the same bytes for the same input."""

import dataclasses
import json
import shutil

import pytest
from device import fleet

from r1export.errors import CheckFailed, InputError
from r1export.update.atomic_io import sha256_file
from r1export.update.container import read_tensors, write_tensors
from r1export.update.lab.publish import (
    Step,
    Terms,
    make_bundle,
    plan_delivery,
    read_factors,
    read_releases,
    sign_delivery,
)

TERMS = Terms(1_800_000_000, "camera", "v1")


def test_only_what_is_lacking_travels(run, key):
    for since, carried in ((0, ["digits", "shapes", "colours"]), (1, ["shapes", "colours"]), (2, ["colours"]), (3, [])):
        bundle = make_bundle(run, Step(3, since), [key], TERMS)
        assert [update.task for update in bundle.manifest.updates if update.experts] == carried
        assert [update.task for update in bundle.manifest.updates] == ["digits", "shapes", "colours"]


def test_the_same_input_gives_the_same_bytes(run, key):
    one, other = (make_bundle(run, Step(2, 1), [key], TERMS) for _ in range(2))
    assert one.to_bytes() == other.to_bytes()


def test_reports_are_named_by_digest_but_do_not_travel(run, key, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    release = tmp_path / "run" / "releases" / "01-digits"
    (release / "report.json").write_text("{}")
    (release / "report.xml").write_text("<testsuites/>")
    bundle = make_bundle(tmp_path / "run", Step(1), [key], TERMS)
    names = {"report.json", "report.xml"}
    assert bundle.manifest.evidence == {name: sha256_file(release / name) for name in names}
    assert not names & {file.path for file in bundle.manifest.files}


def test_unknown_releases_and_tasks_and_a_key_given_twice_are_refused(run, key):
    for release, since in ((9, 0), (1, 9)):
        with pytest.raises(InputError, match="has the releases"):
            make_bundle(run, Step(release, since), [key], TERMS)
    with pytest.raises(InputError, match="no task dogs"):
        make_bundle(run, Step(1, drop=("dogs",), seq=9), [key], TERMS, fleet.refresh)
    with pytest.raises(InputError, match="once"):
        make_bundle(run, Step(1), [key, key], TERMS)


def test_milliseconds_are_not_taken_for_seconds():
    with pytest.raises(InputError, match="use seconds, not milliseconds"):
        dataclasses.replace(TERMS, expires=1_900_000_000_000)


def test_an_update_that_expired_before_it_was_made_is_refused(run, key):
    for expires in (TERMS.created, TERMS.created - 1, 1):
        with pytest.raises(InputError, match="check this machine's clock"):
            make_bundle(run, Step(1), [key], dataclasses.replace(TERMS, expires=expires))
    assert make_bundle(run, Step(1), [key], dataclasses.replace(TERMS, expires=TERMS.created + 1))


def test_a_rollback_and_a_dropped_task_need_a_sequence_of_their_own(run, key):
    with pytest.raises(InputError, match="needs a sequence number"):
        make_bundle(run, Step(1, 3), [key], TERMS)
    with pytest.raises(InputError, match="needs a sequence number"):
        make_bundle(run, Step(3, 3, ("shapes",)), [key], TERMS)


def test_a_dropped_task_is_refused_where_class_embeddings_would_be_stale(run, key):
    with pytest.raises(InputError, match="class embeddings"):
        make_bundle(run, Step(3, 3, ("shapes",), 9), [key], TERMS)


def test_a_release_that_cannot_be_derived_is_refused(run, key, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    folder = tmp_path / "run" / "releases" / "01-digits"
    tensors = read_tensors(folder / "visual.safetensors")
    tensors["visual.proj.weight"] = tensors["visual.proj.weight"] * 1.5
    write_tensors(folder / "visual.safetensors", tensors)
    with pytest.raises(CheckFailed, match=r"visual\.safetensors is corrupted"):
        make_bundle(tmp_path / "run", Step(1), [key], TERMS)
    document = json.loads((folder / "manifest.json").read_text())
    import hashlib

    document["files"]["visual.safetensors"]["sha256"] = hashlib.sha256(
        (folder / "visual.safetensors").read_bytes()
    ).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(CheckFailed, match=r"is not base \+ factors"):
        make_bundle(tmp_path / "run", Step(1), [key], TERMS)


def test_a_release_that_changes_what_no_update_names_is_refused(run, key, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    manifest = tmp_path / "run" / "releases" / "01-digits" / "manifest.json"
    document = json.loads(manifest.read_text())
    document["tensors"]["visual.proj.bias"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(document))
    with pytest.raises(CheckFailed, match=r"visual\.proj\.bias differs"):
        make_bundle(tmp_path / "run", Step(1), [key], TERMS)


def changed_release(run, to, path, data):
    """A copy of the run whose first release has `data` as the file `path`, and says so."""
    shutil.copytree(run, to)
    folder = to / "releases" / "01-digits"
    (folder / path).write_bytes(data)
    document = json.loads((folder / "manifest.json").read_text())
    document["files"][path] = {"sha256": sha256_file(folder / path), "bytes": len(data)}
    (folder / "manifest.json").write_text(json.dumps(document))
    return to


@pytest.mark.parametrize("path", ["classes/digits.json", "manifest.json"])
def test_a_file_that_changes_after_it_was_planned_is_refused(run, key, tmp_path, path):
    shutil.copytree(run, tmp_path / "run")
    delivery = plan_delivery(tmp_path / "run", Step(1))
    file = delivery.target.path / path
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(CheckFailed, match=rf"{path} is corrupted"):
        sign_delivery(delivery, TERMS, [key])


@pytest.mark.parametrize("path", ["visual.onnx", "other.onnx"])
def test_a_release_with_a_graph_of_its_own_is_refused(run, key, tmp_path, path):
    data = (run / "releases" / "00-base" / "visual.onnx").read_bytes() + b"\x00"
    with pytest.raises(CheckFailed, match="a new graph needs a new base"):
        make_bundle(changed_release(run, tmp_path / "run", path, data), Step(1), [key], TERMS)


def test_weights_that_differ_though_no_update_changes_them_are_refused(run, key, tmp_path):
    releases = tmp_path / "run" / "releases"
    shutil.copytree(run / "releases" / "00-base", releases / "00-base")
    data = (releases / "00-base" / "textual.safetensors").read_bytes() + b"\x00"
    (releases.parent / "tasks").mkdir()
    shutil.copytree(releases / "00-base", releases / "01-digits")
    document = json.loads((releases / "01-digits" / "manifest.json").read_text()) | {"sequence": 1}
    (releases / "01-digits" / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(CheckFailed, match=r"is not base \+ factors"):
        make_bundle(
            changed_release(tmp_path / "run", tmp_path / "changed", "textual.safetensors", data), Step(1), [key], TERMS
        )


def test_factors_that_this_program_did_not_write_are_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = next((tmp_path / "run" / "tasks").glob("01-*/factors.safetensors"))
    tensors = read_tensors(path)
    write_tensors(path, dict(reversed(tensors.items())))
    with pytest.raises(InputError, match="canonical"):
        read_factors(tmp_path / "run")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="r1export run"):
        read_releases(tmp_path)
