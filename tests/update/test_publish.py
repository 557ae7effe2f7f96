"""Making updates: only what a device lacks, only what can be derived, the same bytes for the same input."""

import json
import shutil

import pytest
from device import fleet
from hypothesis import given
from hypothesis import strategies as st

from r1export.errors import CheckFailed, InputError
from r1export.update.bundle import Bundle
from r1export.update.container import read_tensors, write_tensors
from r1export.update.files import sha256_file
from r1export.update.publish import Terms, _differences, make_bundle, read_factors, read_releases

TERMS = Terms("camera", "v1", created=1_800_000_000)


def test_only_what_is_lacking_travels(run, key, tmp_path):
    for since, carried in ((0, ["digits", "shapes", "colours"]), (1, ["shapes", "colours"]), (2, ["colours"]), (3, [])):
        bundle = make_bundle(run, 3, since, [key], tmp_path / f"{since}.r1u", terms=TERMS)
        assert [update.task for update in bundle.manifest.updates if update.experts] == carried
        assert [update.task for update in bundle.manifest.updates] == ["digits", "shapes", "colours"]


def test_the_same_input_gives_the_same_bytes(run, key, tmp_path):
    for name in ("one", "two"):
        make_bundle(run, 2, 1, [key], tmp_path / name, terms=TERMS)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_reports_are_named_by_digest_but_do_not_travel(run, key, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    release = tmp_path / "run" / "releases" / "01-digits"
    (release / "report.json").write_text("{}")
    (release / "report.xml").write_text("<testsuites/>")
    bundle = make_bundle(tmp_path / "run", 1, 0, [key], tmp_path / "u.r1u", terms=TERMS)
    names = {"report.json", "report.xml"}
    assert bundle.manifest.evidence == {name: sha256_file(release / name) for name in names}
    assert not names & {file.path for file in bundle.manifest.files}


def test_unknown_releases_and_tasks_and_files_that_exist_are_refused(run, key, tmp_path):
    out = tmp_path / "u.r1u"
    for release, since in ((9, 0), (1, 9)):
        with pytest.raises(InputError, match="has the releases"):
            make_bundle(run, release, since, [key], out)
    with pytest.raises(InputError, match="no task dogs"):
        make_bundle(run, 1, 0, [key], out, drop=["dogs"], seq=9, refresh=fleet.refresh)
    with pytest.raises(InputError, match="once"):
        make_bundle(run, 1, 0, [key, key], out)
    assert not out.exists()
    out.write_text("precious")
    with pytest.raises(InputError, match="exists"):
        make_bundle(run, 1, 0, [key], out)
    assert out.read_text() == "precious"
    make_bundle(run, 1, 0, [key], out, overwrite=True)
    assert Bundle.parse(out.read_bytes(), [key.public]).manifest.seq == 1


def test_a_rollback_and_a_dropped_task_need_a_sequence_of_their_own(run, key, tmp_path):
    with pytest.raises(InputError, match="sequence number of its own"):
        make_bundle(run, 1, 3, [key], tmp_path / "u.r1u")
    with pytest.raises(InputError, match="sequence number of its own"):
        make_bundle(run, 3, 3, [key], tmp_path / "u.r1u", drop=["shapes"])


def test_a_dropped_task_is_refused_where_class_embeddings_would_be_stale(run, key, tmp_path):
    with pytest.raises(InputError, match="class embeddings"):
        make_bundle(run, 3, 3, [key], tmp_path / "u.r1u", drop=["shapes"], seq=9)


def test_a_release_that_cannot_be_derived_is_refused(run, key, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    folder = tmp_path / "run" / "releases" / "01-digits"
    tensors = read_tensors(folder / "visual.safetensors")
    tensors["visual.proj.weight"] = tensors["visual.proj.weight"] * 1.5
    write_tensors(folder / "visual.safetensors", tensors)
    with pytest.raises(CheckFailed, match=r"visual\.safetensors is damaged"):
        make_bundle(tmp_path / "run", 1, 0, [key], tmp_path / "u.r1u")
    document = json.loads((folder / "manifest.json").read_text())
    import hashlib

    document["files"]["visual.safetensors"]["sha256"] = hashlib.sha256(
        (folder / "visual.safetensors").read_bytes()
    ).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(CheckFailed, match="not the base with the factors merged"):
        make_bundle(tmp_path / "run", 1, 0, [key], tmp_path / "u.r1u")


def test_a_release_that_changes_what_no_update_names_is_refused(run, key, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    manifest = tmp_path / "run" / "releases" / "01-digits" / "manifest.json"
    document = json.loads(manifest.read_text())
    document["tensors"]["visual.proj.bias"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(document))
    with pytest.raises(CheckFailed, match=r"visual\.proj\.bias differs"):
        make_bundle(tmp_path / "run", 1, 0, [key], tmp_path / "u.r1u")


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


lines = st.lists(
    st.sampled_from(
        [b"a line of text that is long enough to be worth keeping, and so it is kept\n", b"b\n", b"c" * 80 + b"\n"]
    ),
    max_size=8,
)


@given(lines, lines)
def test_differences_make_the_new_file_of_the_old_one(old, new):
    one, other = b"".join(old), b"".join(new)
    pieces = _differences(one, other)
    assert b"".join((one if kind == "base" else other)[start:stop] for kind, start, stop in pieces) == other
    assert all(start < stop for _, start, stop in pieces)
