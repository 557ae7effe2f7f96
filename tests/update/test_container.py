"""The safetensors container: what the library writes we read, what we write the library reads, and nothing else passes."""

import json
import os
from contextlib import suppress

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from r1export.errors import InputError
from r1export.update.container import (
    NAMES,
    map_tensors,
    parse_tensors,
    plan,
    read_layout,
    read_tensors,
    write_layout,
    write_tensors,
)

TENSORS = {
    "matrix": np.arange(6, dtype=np.float32).reshape(2, 3), "half": np.ones((3,), np.float16), "scalar": np.array(4.5, np.float32),
    "ids": np.array([[1, -2]], np.int64), "empty": np.zeros((0, 4), np.float32),
}  # fmt: skip


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return set(one) == set(other) and all(
        one[n].dtype == other[n].dtype and np.array_equal(one[n], other[n]) for n in one
    )


def test_the_library_reads_what_we_write(tmp_path) -> None:
    write_tensors(tmp_path / "f.safetensors", TENSORS)
    assert same(safetensors.numpy.load_file(tmp_path / "f.safetensors"), TENSORS)


def test_we_read_what_the_library_writes(tmp_path) -> None:
    safetensors.numpy.save_file(TENSORS, tmp_path / "f.safetensors", metadata={"made": "elsewhere"})
    assert same(read_tensors(tmp_path / "f.safetensors"), TENSORS)


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8),
        st.tuples(st.sampled_from(sorted(NAMES, key=str)), st.lists(st.integers(0, 3), max_size=3)),
        max_size=5,
    )
)
def test_any_tensors_survive_the_round_trip(tmp_path_factory, specs) -> None:
    path = tmp_path_factory.mktemp("c") / "f.safetensors"
    tensors = {name: np.ones(shape, dtype) for name, (dtype, shape) in specs.items() if name != "__metadata__"}
    write_tensors(path, tensors)
    assert same(read_tensors(path), tensors)
    assert list(read_tensors(path)) == list(tensors) or any(t.size == 0 for t in tensors.values())


def test_mapped_tensors_cannot_be_written(tmp_path) -> None:
    write_tensors(tmp_path / "f.safetensors", TENSORS)
    with pytest.raises(ValueError, match="read-only"):
        map_tensors(tmp_path / "f.safetensors")["matrix"][0, 0] = 1


def test_other_values_in_the_same_layout_lie_at_the_same_place(tmp_path) -> None:
    layout = plan((n, t.dtype, t.shape) for n, t in TENSORS.items())
    write_layout(tmp_path / "f.safetensors", layout, lambda spec: TENSORS[spec.name] * 0)
    found = read_layout(tmp_path / "f.safetensors")
    assert found.header == layout.header
    assert found.by_name["matrix"] == layout.by_name["matrix"]
    assert (tmp_path / "f.safetensors").stat().st_size == layout.nbytes


def test_a_tensor_that_does_not_fit_its_layout_is_refused_and_leaves_no_file(tmp_path) -> None:
    layout = plan([("w", np.dtype(np.float32), (2, 2))])
    with pytest.raises(ValueError, match="expected float32"):
        write_layout(tmp_path / "f.safetensors", layout, lambda spec: np.zeros((2, 3), np.float32))
    assert list(tmp_path.iterdir()) == []


def raw(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
BAD = {
    "nothing": b"",
    "header longer than the file": (100).to_bytes(8, "little") + b"{}",
    "header of 2^63 bytes": (2**63).to_bytes(8, "little") + b"{}",
    "no JSON": raw(b"{nope"),
    "a list": raw(b"[1]"),
    "unknown dtype": raw(json.dumps({"w": F32 | {"dtype": "F31"}}).encode(), b"1234"),
    "trailing bytes": raw(json.dumps({"w": F32}).encode(), b"12345"),
    "missing bytes": raw(json.dumps({"w": F32}).encode(), b"123"),
    "a gap": raw(json.dumps({"w": F32 | {"data_offsets": [4, 8]}}).encode(), b"12345678"),
    "an overlap": raw(json.dumps({"w": F32, "x": F32}).encode(), b"1234"),
    "a length that is not the shape's": raw(json.dumps({"w": F32 | {"shape": [2]}}).encode(), b"1234"),
    "a negative shape": raw(json.dumps({"w": F32 | {"shape": [-1, -1]}}).encode(), b"1234"),
    "a fractional shape": raw(json.dumps({"w": F32 | {"shape": [1.0]}}).encode(), b"1234"),
    "a boolean shape": raw(json.dumps({"w": F32 | {"shape": [True]}}).encode(), b"1234"),
    "duplicate keys": raw(b'{"w":' + json.dumps(F32).encode() + b',"w":' + json.dumps(F32).encode() + b"}", b"1234"),
    "no offsets": raw(b'{"w":{"dtype":"F32","shape":[1]}}', b"1234"),
    "deep nesting": raw(b"[" * 100000),
    "offsets with a point": raw(json.dumps({"w": F32 | {"data_offsets": [0.0, 4.0]}}).encode(), b"1234"),
    "one offset": raw(json.dumps({"w": F32 | {"data_offsets": [0]}}).encode(), b"1234"),
    "offsets that are no list": raw(json.dumps({"w": F32 | {"data_offsets": 4}}).encode(), b"1234"),
    "a boolean offset": raw(json.dumps({"w": F32 | {"data_offsets": [False, 4]}}).encode(), b"1234"),
    "an offset of 4000 digits": raw(
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,' + b"9" * 4000 + b"]}}", b"1234"
    ),
    "a size of 4000 digits": raw(b'{"w":{"dtype":"F32","shape":[0,' + b"9" * 4000 + b'],"data_offsets":[0,0]}}'),
    "more axes than numpy has": raw(json.dumps({"w": F32 | {"shape": [1] * 65}}).encode(), b"1234"),
    "a shape that overflows": raw(
        json.dumps({"w": F32 | {"shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}}).encode()
    ),
    "a shape that is no list": raw(json.dumps({"w": F32 | {"shape": 1}}).encode(), b"1234"),
    "an entry that is no object": raw(json.dumps({"w": [1]}).encode()),
    "half a surrogate pair": raw(json.dumps({"\ud800": F32}).encode(), b"1234"),
    "no UTF-8": raw(b'{"\xff":{}}'),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_container_is_refused(name: str, tmp_path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(BAD[name])
    with pytest.raises(InputError, match=r"bad\.safetensors: invalid safetensors file"):
        read_layout(path)


def test_a_missing_container_is_named(tmp_path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_tensors(tmp_path / "none.safetensors")


@pytest.mark.parametrize("name", BAD)
def test_malformed_bytes_in_memory_are_refused_too(name: str, tmp_path) -> None:
    with pytest.raises(InputError, match=r"bad\.safetensors: invalid safetensors file"):
        parse_tensors(BAD[name], tmp_path / "bad.safetensors")


def test_bytes_in_memory_hold_the_same_tensors_as_the_file(tmp_path) -> None:
    path = tmp_path / "f.safetensors"
    for tensors in (TENSORS, {"empty": np.zeros((0, 4), np.float32)}, {}):
        write_tensors(path, tensors)
        assert same(parse_tensors(path.read_bytes(), path), tensors)
        assert same(map_tensors(path), tensors)


def test_what_is_no_file_is_refused_and_a_pipe_is_not_waited_for(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in (".", "pipe"):
        for read in (read_layout, read_tensors):
            with pytest.raises(InputError, match="is not a regular file"):
                read(tmp_path / name)


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
_ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*NAMES.values(), "F31", 1]),
        "shape": st.lists(st.integers(-1, 3), max_size=3) | st.lists(_SCALARS, max_size=3) | _SCALARS,
        "data_offsets": st.lists(st.integers(-1, 64), min_size=2, max_size=2) | st.lists(_SCALARS, max_size=3),
    },
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=3), _ENTRY | _SCALARS, max_size=3) | _SCALARS, st.binary(max_size=64))
def test_any_header_is_read_or_refused(tmp_path_factory, header, data) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(raw(json.dumps(header).encode(), data))
    with suppress(InputError):
        for tensor in read_tensors(path).values():
            assert tensor.nbytes <= len(data)
