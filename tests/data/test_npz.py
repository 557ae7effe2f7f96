"""A pack is read lazily and never unpickled; one that is not laid out as documented is refused."""

import tempfile
import tracemalloc
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import dotted
from running import RECIPE, r1export

from r1export.data.npz import read_pack
from r1export.errors import InputError

DATA = Path(__file__).parents[2].parent / "shared" / "data"


def webp(red: int) -> bytes:
    file = BytesIO()
    dotted((red, 0, 0)).save(file, "WEBP", lossless=True)
    return file.getvalue()


def arrays(**changes) -> dict[str, np.ndarray]:
    """Four images with the red levels 10, 20, 30, 40: train, test, left out, train."""
    files = [webp(red) for red in (10, 20, 30, 40)]
    sound = {
        "blob": np.frombuffer(b"".join(files), np.uint8),
        "off": np.cumsum([0, *map(len, files)]),
        "label": np.array([0, 1, 0, 1], np.int16),
        "split": np.array([0, 2, 1, 0], np.uint8),
        "names": np.array(["tabby, tabby cat", "sea_horse"]),
    }
    return {key: value for key, value in (sound | changes).items() if value is not None}


def save(folder: Path, **changes) -> Path:
    np.savez(folder / "pets.npz", **arrays(**changes))
    return folder / "pets.npz"


with tempfile.TemporaryDirectory() as _folder:
    PACK = save(Path(_folder)).read_bytes()


def test_images_are_read_with_their_labels_and_split(tmp_path):
    task = read_pack(save(tmp_path))
    assert [task.train.read(i).getpixel((0, 0))[0] for i in range(2)] == [10, 40]
    assert [task.test.read(0).getpixel((0, 0))[0]] == [20]
    assert (task.train.labels.tolist(), task.test.labels.tolist()) == ([0, 1], [1])
    assert task.train.labels.dtype == np.int64


def test_a_class_is_named_by_its_first_synonym_with_spaces(tmp_path):
    task = read_pack(save(tmp_path))
    assert (task.name, task.classes) == ("pets", ("tabby", "sea horse"))


def test_a_damaged_image_is_named_by_pack_and_index(tmp_path):
    blob = arrays()["blob"].copy()
    blob[arrays()["off"][3] :] = 0
    task = read_pack(save(tmp_path, blob=blob))
    with pytest.raises(InputError, match=r"pets\.npz: image 3"):
        task.train.read(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"off": None}, "no array off"),
        ({"split": None, "names": None}, "no array split, names"),
        ({"blob": np.zeros(9, np.uint16)}, "blob is uint16"),
        ({"blob": np.zeros(9)}, r"blob is float64 \(9,\), expected uint8"),
        ({"label": np.array([0.0, 1.0, 0.0, 1.0])}, "label is float64"),
        ({"label": np.zeros((2, 2), int)}, r"label is int64 \(2, 2\)"),
        ({"split": np.zeros(3, int)}, r"split is int64 \(3,\), expected integers \(4,\)"),
        ({"off": np.zeros(4, int)}, r"off is int64 \(4,\), expected integers \(5,\)"),
        ({"names": np.array([1, 2])}, "names is int64"),
        ({"off": np.array([0, 5, 3, 6, 7])}, "off is not increasing"),
        ({"off": np.array([-1, 5, 6, 7, 8])}, "off is not increasing"),
        ({"off": np.array([0, 1, 2, 3, 10**9])}, "off is not increasing"),
    ],
)
def test_a_pack_with_another_layout_is_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as refused:
        read_pack(save(tmp_path, **changes))
    assert "pets.npz" in refused.value.message


def test_a_pickled_array_is_refused_and_not_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    with pytest.raises(InputError, match=r"not an \.npz of plain arrays"):
        read_pack(save(tmp_path, names=np.array([Trap(), Trap()], object)))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"not a pack", b"PK\x03\x04 torn"])
def test_a_file_that_is_no_archive_is_refused(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"not an \.npz"):
        read_pack(tmp_path / "x.npz")


def test_a_torn_archive_is_refused(tmp_path):
    file = save(tmp_path)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"not an \.npz"):
        read_pack(file)


def test_a_lone_array_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(3))
    with pytest.raises(InputError, match=r"not an \.npz"):
        read_pack(tmp_path / "x.npy")


def test_a_missing_pack_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.npz: no such file"):
        read_pack(tmp_path / "gone.npz")


def test_objects_are_refused_even_where_their_header_fits(tmp_path):
    file = claim(save(tmp_path), len(arrays()["blob"]) // 8, "|O", extra=-(len(arrays()["blob"]) % 8) or None)
    with pytest.raises(InputError, match="Python objects"):
        read_pack(file)


def claim(file: Path, count: int, descr: str = "|u1", extra: int | None = None) -> Path:
    """The pack with a header that says `blob` has `count` elements; `extra` cuts its bytes."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    blob = BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(blob, header)
    members["blob.npy"] = blob.getvalue() + arrays()["blob"].tobytes()[:extra]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file


@pytest.mark.parametrize("count", [10**12, 2**62, 1, 0])
def test_a_header_that_says_more_or_less_than_there_is_is_refused_unallocated(tmp_path, count):
    file = claim(save(tmp_path), count)
    with pytest.raises(InputError, match=r"blob\.npy has \d+ bytes, expected \d+ by its header"):
        read_pack(file)
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE.replace("builtin:digits", f"npz:{file}"), encoding="utf-8")
    assert r1export("train", recipe, "--out", tmp_path / "run").returncode == 2


def test_a_header_and_a_directory_that_agree_on_a_terabyte_allocate_what_is_there(tmp_path):
    """The zip directory's own size is not believed either."""
    file = claim(save(tmp_path), 10**9)
    data = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        size = archive.getinfo("blob.npy").file_size
    header = size - len(arrays()["blob"])
    data = bytes(data).replace(size.to_bytes(4, "little"), (header + 10**9).to_bytes(4, "little"))
    file.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"not an \.npz"):
        read_pack(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), min_size=1, max_size=6), st.integers(0, 60))
def test_a_damaged_pack_is_a_task_or_bad_input(changes, cut):
    data = bytearray(PACK)
    for position, value in changes:
        data[position % len(data)] = value
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x.npz").write_bytes(data[: len(data) - cut])
        try:
            task = read_pack(Path(folder) / "x.npz")
            outcome = {task.train.read(i).mode for i in range(len(task.train))} or {"RGB"}
        except InputError as error:
            outcome = {"bad input" if "x.npz" in str(error) else str(error)}
    assert outcome in ({"RGB"}, {"bad input"})


@pytest.mark.skipif(not DATA.is_dir(), reason="the real packs are not on this machine")
def test_a_real_pack_has_the_images_that_its_description_says():
    task = read_pack(DATA / "rsscn7.npz")
    assert (len(task.classes), len(task.train), len(task.test)) == (7, 1680, 840)
    assert task.train.read(0).mode == "RGB"
    assert max(task.test.read(839).size) == 64
