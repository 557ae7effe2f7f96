"""The safetensors container: what the library writes we read, what we write the library reads, and nothing else passes."""

import json

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from r1export.errors import InputError
from r1export.update.container import NAMES, map_tensors, plan, read_layout, read_tensors, write_layout, write_tensors

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
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_container_is_refused(name: str, tmp_path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(BAD[name])
    with pytest.raises(InputError, match=r"bad\.safetensors: not a well-formed safetensors file"):
        read_layout(path)


def test_a_missing_container_is_named(tmp_path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_tensors(tmp_path / "none.safetensors")
