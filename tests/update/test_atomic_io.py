"""Files appear whole or not at all."""

import hashlib
import os

import numpy as np
import pytest

from r1export.update.atomic_io import new_folder, sha256_bytes, sha256_file, write_file, write_json


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
