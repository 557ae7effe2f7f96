"""The signed manifest: what is said twice the same way, and everything that is refused."""

import copy
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1export.errors import InputError, R1ExportError, Unsupported
from r1export.update.lab.publish import Step, Terms, make_bundle
from r1export.update.manifest import MAX_MANIFEST, Manifest

HOSTILE_PATHS = [
    "../x",
    "a/../../x",
    "/etc/passwd",
    "a//b",
    "a/",
    ".",
    "..",
    "",
    "./a",
    "a/./b",
    ".hidden",
    "a/.hidden",
    "a\\b",
    "C:\\x",
    "C:x",
    "\\\\host\\share",
    "a\0b",
    "a\nb",
    "a b",
    "~root",
    "$HOME",
    "con",
    "CON.txt",
    "a/nul",
    "COM1",
    "lpt9.safetensors",
    "a.",
    "a/b.",
    "é",
    "\u202etxt",
    "\ud800",
    "update.r1u",
    "UPDATE.R1U",
    "MANIFEST.JSON",
    "visual.onnx/x",
    "Visual.onnx",
    "a" * 201,
    "/".join("a" * 9),
    "-rf",
    "a:stream",
    "%2e%2e/x",
]


@pytest.fixture(scope="session")
def text(run: Path, key) -> bytes:
    return make_bundle(run, Step(2, since=1), [key], Terms(created=1_800_000_000)).manifest_bytes


@pytest.fixture
def document(text: bytes) -> dict:
    return json.loads(text)


def parse(document: object) -> Manifest:
    return Manifest.parse(json.dumps(document).encode())


def refused(document: object, match: str = ".") -> None:
    with pytest.raises(InputError, match=match):
        parse(document)


def test_what_was_written_is_read(text):
    manifest = Manifest.parse(text)
    assert manifest.to_bytes() == text
    assert Manifest.parse(manifest.to_bytes()) == manifest
    assert [bool(update.experts) for update in manifest.updates] == [False, True]


@pytest.mark.parametrize("path", HOSTILE_PATHS)
def test_a_hostile_path_is_refused(document, path):
    document["files"].append({"path": path, "bytes": 0, "sha256": "0" * 64, "parts": []})
    refused(document, "files|surrogates")


def test_the_same_file_without_a_hostile_path_is_accepted(document):
    document["files"].append({"path": "notes/harmless.txt", "bytes": 0, "sha256": "0" * 64, "parts": []})
    assert parse(document).files[-1].path == "notes/harmless.txt"


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("seq", True),
        ("seq", 2.0),
        ("seq", "2"),
        ("seq", 0),
        ("seq", -1),
        ("seq", 2**53),
        ("min_seq", 3),
        ("created", None),
        ("expires", -1),
        ("product", ""),
        ("product", "a\u0000b"),
        ("product", "x" * 101),
        ("device_class", ["a"]),
        ("payload", {"bytes": 1 << 30, "sha256": "0" * 64}),
        ("payload", {"bytes": 8}),
        ("base", {"name": "tiny", "sha256": "0" * 63, "manifest": "0" * 64}),
        ("base", {"name": "tiny", "sha256": "A" * 64, "manifest": "0" * 64}),
        ("health", {"max_abs": "small", "min_cosine": 1, "min_agreement": 1}),
        ("health", {"max_abs": 1e9, "min_cosine": 1, "min_agreement": 1}),
        ("health", {"max_abs": True, "min_cosine": 1, "min_agreement": 1}),
        ("updates", {}),
        ("tensors", {}),
        ("files", []),
        ("evidence", {"../report": "0" * 64}),
        ("critical", 1),
    ],
)
def test_a_member_that_is_not_what_it_has_to_be_is_refused_by_name(document, member, value):
    document[member] = value
    refused(document, member)


def test_every_missing_member_is_named(document):
    for member in list(document):
        refused({name: value for name, value in document.items() if name != member}, member)


def test_members_named_x_may_be_ignored(document):
    document["x-note"] = {"any": [1.5, None]}
    assert parse(document) == parse({name: value for name, value in document.items() if name != "x-note"})


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e.update(rows=[8, 8]),
        lambda e: e.update(rows=[8]),
        lambda e: e.update(rows=[True, 8]),
        lambda e: e.update(rows=[-1, 8]),
        lambda e: e.update(k=0),
        lambda e: e.update(k=10**9),
        lambda e: e.update(k=e["k"] + 1),
        lambda e: e.update(u=e["u"] + 4),
        lambda e: e.update(v=e["v"] - 4),
        lambda e: e.update(v=e["u"]),
        lambda e: e.update(tensor="a\nb"),
        lambda e: e.update(tensor="zzz"),
        lambda e: e.update({"in": 10**8}),
    ],
)
def test_gaps_overlaps_and_wrong_shapes_of_factors_are_refused(document, change):
    change(document["updates"][1]["experts"][0])
    refused(document)


@pytest.mark.parametrize(
    "parts",
    [
        [["base", 0, 10]],
        [["payload", 0, 55]],
        [["elsewhere", 0, 55]],
        [["base", 0, 0], ["base", 0, 55]],
        [["base", -1, 55]],
        [["base", 0.0, 55]],
        [["base", 0]],
        "base",
        [["base", 0, 1]] * 5000,
    ],
)
def test_parts_that_do_not_make_the_file_or_the_payload_are_refused(document, parts):
    next(file for file in document["files"] if file["path"] == "classes/digits.json")["parts"] = parts
    refused(document)


def test_experts_out_of_order_or_twice_are_refused(document):
    reordered = copy.deepcopy(document)
    reordered["updates"][1]["experts"].reverse()
    refused(reordered, "sorted")
    document["updates"].append(document["updates"][0])
    refused(document, "duplicate update")


def test_a_newer_format_updater_or_algorithm_asks_for_a_newer_updater(document):
    for member, value in (("format", "r1export.bundle/2"), ("min_updater", 2), ("algorithm", "r2-f64-v1")):
        with pytest.raises(Unsupported, match="update the updater"):
            parse(document | {member: value})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b'{"a":1}x',
        b"\xff\xfe",
        b'{"a":"\xff"}',
        b"\xef\xbb\xbf{}",
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":1e400}',
        b'{"a":-1e999}',
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"a":0.' + b"1" * 5000 + b"}",
        b'{"a":1,"a":1}',
        b'{"a":{"b":1,"b":2}}',
        b"[" * 500_000,
        b'{"a":' * 100_000,
        b'{"a":"\t"}',
        b" " * (MAX_MANIFEST + 1),
        b'{"a":[' + b"0," * 400_000 + b"0]}",
    ],
)
def test_what_is_not_one_strict_json_object_is_refused_in_little_memory(data):
    tracemalloc.start()
    with pytest.raises(InputError) as caught:
        Manifest.parse(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20
    assert len(str(caught.value)) < 600


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3),
)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_one_changed_value_anywhere_is_refused_or_read_as_it_stands(text, data):
    document = json.loads(text)
    node, keys = document, []
    while isinstance(node, dict | list) and node:
        keys.append(data.draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node)))))
        node = node[keys[-1]]
    parent = document
    for name in keys[:-1]:
        parent = parent[name]
    parent[keys[-1]] = data.draw(json_values)
    try:
        manifest = parse(document)
    except R1ExportError:
        return
    assert Manifest.parse(manifest.to_bytes()) == manifest
