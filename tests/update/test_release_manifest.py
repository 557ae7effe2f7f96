"""A release's manifest: the same bytes again, a digest of itself, and one kind of error for whatever else stands there."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1export.errors import CheckFailed, InputError
from r1export.update.container import DTYPES, TensorSpec
from r1export.update.names import NAME, PARAMETER, PATH, PRINTABLE, check_paths
from r1export.update.release_manifest import (
    MANIFEST,
    BaseModel,
    FileEntry,
    GoldenGate,
    MergedUpdate,
    Release,
    ReleaseManifest,
    TaskEntry,
    TensorEntry,
    manifest_digest,
)

EXAMPLE = ReleaseManifest(
    name="02-shapes",
    sequence=2,
    procedure="r1-f64-v1+q8",
    precision="int8",
    base=BaseModel("builtin:world", "0" * 64, "Apache-2.0"),
    updates=(MergedUpdate("digits", "1" * 64), MergedUpdate("shapes", "2" * 64)),
    tasks=(TaskEntry("digits", 10, True, 0.5), TaskEntry("shapes", 2, True, None)),
    graphs={"visual.onnx": "3" * 64},
    golden=GoldenGate(5e-05, 0.999999),
    files={"w.safetensors": FileEntry("4" * 64, 1000), "classes/digits.json": FileEntry("5" * 64, 20)},
    tensors={
        "fc.weight": TensorEntry("w.safetensors", 100, np.dtype("i1"), (4, 6), ((0, 3), (3, 6)), True, "6" * 64, "fc.scale"),
        "fc.scale": TensorEntry("w.safetensors", 124, np.dtype("<f4"), (6,), ((0, 6),), False, "7" * 64),
        "logit_scale": TensorEntry("w.safetensors", 148, np.dtype("<f4"), (), (), False, "8" * 64),
    },
    versions={"r1export": "0.1.0", "torch": "2.14.1+cu130"},
).sealed()  # fmt: skip
DIGEST = st.text("0123456789abcdef", min_size=64, max_size=64)
SHARE = st.floats(0, 1)


def test_only_a_model_in_its_deployed_form_says_so() -> None:
    deployed = BaseModel("tiny", "0" * 64, None, 1, "1" * 64, 2e-7)
    assert "deployed_form" not in EXAMPLE.to_json()["base"]
    assert list(deployed.to_json())[3:] == ["deployed_form", "original_sha256", "deployed_difference"]
    document = replace(EXAMPLE, base=deployed).to_json()
    del document["base"]["original_sha256"]
    with pytest.raises(InputError, match="original_sha256"):
        ReleaseManifest.parse(json.dumps(document).encode(), "m")


def texts(pattern):
    return st.from_regex(pattern, fullmatch=True)


@st.composite
def manifests(draw) -> ReleaseManifest:
    """Any manifest whose tensors lie in its files."""
    files = draw(st.dictionaries(texts(PATH), st.builds(FileEntry, DIGEST, st.integers(4096, 2**53 - 1)), max_size=4))
    try:
        check_paths([*files, MANIFEST], "")
    except InputError:
        files = {}
    rows = st.tuples(st.integers(0, 9), st.integers(9, 20))
    entries = st.builds(
        TensorEntry, st.sampled_from(sorted(files) or [""]), st.integers(0, 100), st.sampled_from(sorted(DTYPES)).map(lambda name: np.dtype(DTYPES[name])),
        st.lists(st.integers(0, 4), max_size=3).map(tuple), st.lists(rows, max_size=2).map(tuple), st.booleans(), DIGEST,
    )  # fmt: skip
    digests = st.dictionaries(texts(PATH), DIGEST, max_size=3)
    manifest = ReleaseManifest(
        draw(texts(NAME)), draw(st.integers(0, 2**53 - 1)), draw(texts(NAME)), draw(texts(NAME)),
        draw(st.builds(BaseModel, texts(PRINTABLE), DIGEST, st.none() | texts(PRINTABLE)) | st.builds(
            BaseModel, texts(PRINTABLE), DIGEST, st.none(), st.integers(1, 9), DIGEST, st.floats(0, 2))),
        tuple(draw(st.lists(st.builds(MergedUpdate, texts(NAME), DIGEST), max_size=3))),
        tuple(draw(st.lists(st.builds(TaskEntry, texts(NAME), st.integers(0, 9999), st.booleans(), st.none() | SHARE), max_size=3))),
        draw(digests), draw(st.builds(GoldenGate, st.floats(0, 10), st.floats(-1, 1))), files,
        draw(st.dictionaries(texts(PARAMETER), entries, max_size=3)) if files else {},
        draw(st.dictionaries(texts(NAME), texts(PRINTABLE), max_size=3)),
    )  # fmt: skip
    return manifest.sealed() if draw(st.booleans()) else manifest


@settings(deadline=None)
@given(manifests())
def test_what_was_written_is_read(manifest: ReleaseManifest) -> None:
    parsed = ReleaseManifest.parse(manifest.to_bytes(), "m")
    assert parsed == manifest
    assert parsed.to_bytes() == manifest.to_bytes()
    assert manifest.sha256 in ("", parsed.digest())


def parse(document: object) -> ReleaseManifest:
    return ReleaseManifest.parse(json.dumps(document).encode(), "m")


def members(value: object, path: tuple = ()) -> list[tuple]:
    """The path of every member and item in a document."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, child in pairs for found in ((*path, key), *members(child, (*path, key)))]


DOCUMENT = EXAMPLE.to_json()
VALUES = [None, True, False, -1, 1.5, 2**53, 1e308, "", "x\n", "../x", "\ud800", [], [0], [[]], {}, {"a": 1}]
OPTIONAL = {("graphs",), ("versions",), ("sha256",), ("base", "licence")}


@pytest.mark.parametrize("path", members(DOCUMENT), ids=lambda path: ".".join(map(str, path)))
def test_a_member_of_another_type_is_bad_input_and_nothing_else(path: tuple) -> None:
    for value in VALUES:
        document = copy.deepcopy(DOCUMENT)
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        if json_type(parent[path[-1]]) == json_type(value):
            continue
        parent[path[-1]] = value
        if value is None and path[-1] in ("accuracy", "licence"):
            assert parse(document)
        elif path[-1] == "accuracy" and json_type(value) == "number":
            assert 0 <= value <= 1 or refused(document)
        else:
            assert refused(document), value


def json_type(value: object) -> str:
    return "number" if type(value) in (int, float) else type(value).__name__


def refused(document: object) -> bool:
    try:
        parse(document)
    except InputError as error:
        return error.message.startswith("m") and "\n" not in error.message
    return False


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(members(DOCUMENT)), st.sampled_from(VALUES), st.sampled_from(["set", "delete", "rename", "swap"])
)
def test_any_change_is_read_again_as_it_is_or_refused_as_bad_input(path: tuple, value: object, kind: str) -> None:
    document = copy.deepcopy(DOCUMENT)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    if kind == "set":
        parent[path[-1]] = value
    elif kind == "delete":
        del parent[path[-1]]
    elif kind == "rename" and isinstance(parent, dict):
        parent[f"{path[-1]}\n"] = parent.pop(path[-1])
    elif isinstance(parent, list):
        parent.reverse()
    try:
        found = parse(document)
    except InputError:
        return
    assert parse(found.to_json()) == found


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not strict JSON"),
        (b"[]", "expected an object"),
        (b"\xff", "not strict JSON"),
        (b'{"format": "other/1"}', "expected 'r1export.release/1'"),
        (b'{"a": 1, "a": 1}', "duplicate key"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + b"1" * 5000 + b"}", "digits"),
        (b'{"a": ' + b"[" * 100_000, "not strict JSON"),
        (b'{"format": "\\ud800"}', "not strict JSON"),
    ],
)
def test_what_is_no_manifest_is_refused_in_one_line(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / MANIFEST).write_bytes(data)
    with pytest.raises(InputError, match=words) as caught:
        ReleaseManifest.read(tmp_path)
    assert str(tmp_path / MANIFEST) in caught.value.message
    assert "\n" not in caught.value.message


def test_a_folder_without_a_manifest_is_no_release(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not a release: it has no manifest\.json"):
        ReleaseManifest.read(tmp_path / "nothing")
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(InputError, match=r"manifest\.json is not a regular file"):
        ReleaseManifest.read(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["a\n/../../x", "../x", "/etc/passwd", "a\\b", ".hidden", "a//b", "a/", "a\nb", "é", "manifest.json", "a" * 201],
)
def test_a_file_that_would_lie_elsewhere_is_refused(name: str) -> None:
    document = copy.deepcopy(DOCUMENT)
    document["files"][name] = document["files"]["classes/digits.json"]
    assert refused(document)


def test_a_manifest_that_says_little_is_read_for_verify_to_judge() -> None:
    bare = replace(EXAMPLE, updates=(), tasks=(), graphs={}, files={}, tensors={}, versions={}, sha256="")
    assert parse(bare.to_json()) == bare
    older = bare.to_json()
    for name in ("graphs", "versions"):
        del older[name]
    del older["base"]["licence"]
    assert parse(older) == replace(bare, base=replace(bare.base, licence=None))


def test_tensors_of_the_first_manifests_lack_bytes_and_rows() -> None:
    document = copy.deepcopy(DOCUMENT)
    for entry in document["tensors"].values():
        del entry["bytes"], entry["rows"]
    tensors = {name: replace(entry, rows=()) for name, entry in EXAMPLE.tensors.items()}
    assert parse(document) == replace(EXAMPLE, tensors=tensors)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bytes": 25}, "expected 24, by dtype and shape"),
        ({"file": "gone.safetensors"}, "which is not listed"),
        ({"offset": 977}, "ends at byte 1001 of w.safetensors, which is 1000 bytes long"),
        ({"scale": "gone"}, "its scale gone is not in the list"),
        ({"shape": [0, 2**30, 2**30], "bytes": 0}, "elements"),
        ({"rows": [[3, 1]]}, "start <= stop"),
        ({"rows": [[3]]}, "start <= stop"),
        ({"dtype": "F31"}, "text like"),
        ({"transposed": 1}, "true or false"),
        ({"extra": 1}, "unknown key"),
    ],
)
def test_a_tensor_that_cannot_lie_where_it_says_is_refused(change: dict, words: str) -> None:
    document = copy.deepcopy(DOCUMENT)
    document["tensors"]["fc.weight"] |= change
    with pytest.raises(InputError, match=words):
        parse(document)


def test_the_digest_of_itself_follows_every_member_but_no_order() -> None:
    assert EXAMPLE.sha256 == EXAMPLE.digest() == manifest_digest(dict(reversed(DOCUMENT.items())))
    for path in members(DOCUMENT):
        document = copy.deepcopy(DOCUMENT)
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        del parent[path[-1]]
        assert path == ("sha256",) or manifest_digest(document) != EXAMPLE.sha256
    assert replace(EXAMPLE, sequence=3).digest() != EXAMPLE.sha256


def test_an_unknown_member_is_refused_wherever_it_stands() -> None:
    """Another program may have meant something by it, and the digest of itself could not be computed again."""
    for path in [(), *(path for path in members(DOCUMENT))]:
        document = copy.deepcopy(DOCUMENT)
        target = document
        for key in path:
            target = target[key]
        if isinstance(target, dict) and path not in (("graphs",), ("files",), ("tensors",), ("versions",)):
            target["x-more"] = "2" * 64
            assert refused(document), path


def test_what_is_written_is_what_is_said(tmp_path: Path) -> None:
    EXAMPLE.write(tmp_path)
    assert (tmp_path / MANIFEST).read_bytes() == (json.dumps(DOCUMENT, indent=2) + "\n").encode()
    assert Release.read(tmp_path).manifest == EXAMPLE
    assert EXAMPLE.weights == {"w.safetensors"}
    assert EXAMPLE.tensors["fc.scale"].spec("fc.scale") == TensorSpec("fc.scale", np.dtype("<f4"), (6,), 124)


def test_what_no_reader_would_accept_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"files: "):
        replace(EXAMPLE, files={"../x": FileEntry("0" * 64, 1)}).write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_release_with_a_missing_or_changed_file_does_not_hold(tmp_path: Path) -> None:
    from r1export.update.atomic_io import sha256_bytes

    (tmp_path / "a").write_bytes(b"a")
    replace(EXAMPLE, files={"a": FileEntry(sha256_bytes(b"a"), 1)}, tensors={}).write(tmp_path)
    Release.read(tmp_path).check()
    (tmp_path / "a").write_bytes(b"b")
    with pytest.raises(CheckFailed, match="damaged"):
        Release.read(tmp_path).check()
    (tmp_path / "a").unlink()
    with pytest.raises(CheckFailed, match="missing"):
        Release.read(tmp_path).check()
