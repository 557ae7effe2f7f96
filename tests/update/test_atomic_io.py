"""Files appear whole or not at all."""

import hashlib
import os
import stat

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1export.errors import InputError
from r1export.update.atomic_io import (
    inside,
    make_folder,
    new_folder,
    read_regular,
    sha256_bytes,
    sha256_file,
    write_file,
    write_json,
)


def failing_chunks():
    yield b"half of it"
    raise RuntimeError("cut")


def test_a_write_that_fails_leaves_the_old_file(tmp_path) -> None:
    path = tmp_path / "f"
    write_file(path, b"old")
    with pytest.raises(RuntimeError, match="cut"):
        write_file(path, failing_chunks())
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_a_full_disk_leaves_nothing(tmp_path) -> None:
    """/dev/full takes no byte; the file is written beside it, so the folder is what must stay clean."""
    resource = pytest.importorskip("resource")
    import signal

    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_file(tmp_path / "f", b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert os.listdir(tmp_path) == []


def test_a_written_file_can_be_read_by_others(tmp_path) -> None:
    write_file(tmp_path / "f", [b"a", memoryview(b"b")])
    assert (tmp_path / "f").read_bytes() == b"ab"
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o644


def test_json_refuses_what_json_cannot_say(tmp_path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "f.json", {"x": float("nan")})
    assert os.listdir(tmp_path) == []


def test_a_folder_whose_making_fails_never_appears_and_the_old_one_stays(tmp_path) -> None:
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "old").write_text("old")

    def make() -> None:
        with new_folder(tmp_path / "release") as folder:
            (folder / "new").write_text("new")
            raise RuntimeError("cut")

    with pytest.raises(RuntimeError, match="cut"):
        make()
    assert os.listdir(tmp_path) == ["release"]
    assert os.listdir(tmp_path / "release") == ["old"]


def test_a_new_folder_replaces_the_old_one_whole(tmp_path) -> None:
    for name in ("old", "new"):
        with new_folder(tmp_path / "deep" / "release") as folder:
            (folder / name).write_text(name)
    assert os.listdir(tmp_path / "deep") == ["release"]
    assert os.listdir(tmp_path / "deep" / "release") == ["new"]


def test_digests_are_sha256(tmp_path) -> None:
    data = bytes(range(256)) * 10000
    (tmp_path / "f").write_bytes(data)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(data).hexdigest()
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert sha256_bytes(array) == hashlib.sha256(array.tobytes()).hexdigest()


@pytest.fixture
def umask():
    """Sets the umask for one test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_modes_do_not_depend_on_the_umask(tmp_path, umask, mask) -> None:
    umask(mask)
    write_file(tmp_path / "f", b"")
    write_file(tmp_path / "read-only", b"", 0o444)
    make_folder(tmp_path / "a" / "b")
    with new_folder(tmp_path / "new"):
        pass
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"f": 0o644, "read-only": 0o444, "a": 0o755, "b": 0o755, "new": 0o755}


# --- names that others wrote


OUTSIDE = [
    "", ".", "..", "/", "../x", "/etc/passwd", "a/../../x", "a/../x", "a\n/../../x", "a//b", "a/", "./a", "\0", "a\0b", "\ud800",
    "link", "link/x", "loop", "a/" * 3000,
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_out_of_its_folder_is_refused(tmp_path, name) -> None:
    (tmp_path / "link").symlink_to("/tmp")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="leads out of"):
        inside(tmp_path, name)


@given(st.text(st.sampled_from("./ab\n\0~-\\"), max_size=12))
def test_whatever_name_is_accepted_lies_in_the_folder(tmp_path_factory, name) -> None:
    root = tmp_path_factory.getbasetemp()
    try:
        path = inside(root, name)
    except InputError:
        return
    assert str(path).startswith(f"{root}/")
    assert ".." not in path.parts
    assert path.resolve() == root.resolve() / name


def test_a_plain_name_is_accepted_also_behind_a_link_to_the_folder_itself(tmp_path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    assert inside(tmp_path / "link", "a/b.json") == tmp_path / "link" / "a" / "b.json"


def test_what_is_no_file_is_not_read_and_a_pipe_is_not_waited_for(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"12345")
    for name in (".", "pipe", "/dev/zero"):
        for read in (sha256_file, lambda path: read_regular(path, 4)):
            with pytest.raises(InputError, match="not a regular file"):
                read(tmp_path / name)
    with pytest.raises(InputError, match="more than 4 bytes"):
        read_regular(tmp_path / "large", 4)
    assert read_regular(tmp_path / "large", 5) == b"12345"
