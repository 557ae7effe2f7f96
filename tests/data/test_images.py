"""Images are decoded from the promised formats alone; whatever is damaged is one line that names it."""

import struct
import threading
import zlib
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from running import RECIPE, r1export

from r1export.data.images import FORMATS, MAX_PIXELS, decode, images_from_files
from r1export.data.request import Request
from r1export.data.sources import load_task
from r1export.errors import InputError


def test_images_of_every_mode_are_read_as_rgb(tmp_path):
    Image.new("L", (3, 2), 7).save(tmp_path / "grey.png")
    Image.new("RGBA", (3, 2), (1, 2, 3, 255)).save(tmp_path / "alpha.png")
    images = images_from_files([tmp_path / "grey.png", tmp_path / "alpha.png"], [0, 1])
    assert [images.read(i).mode for i in range(2)] == ["RGB", "RGB"]
    assert images.read(0).getpixel((0, 0)) == (7, 7, 7)
    assert images.labels.dtype == np.int64


def test_a_damaged_image_file_is_named(tmp_path):
    sound = BytesIO()
    Image.effect_noise((32, 32), 50).save(sound, "PNG")
    (tmp_path / "cut.png").write_bytes(sound.getvalue()[:-200])
    (tmp_path / "text.jpg").write_text("not an image")
    images = images_from_files([tmp_path / name for name in ("cut.png", "text.jpg", "gone.jpg")], [0, 0, 0])
    for i, name in enumerate(("cut.png", "text.jpg", "gone.jpg")):
        with pytest.raises(InputError, match=name):
            images.read(i)


def test_damaged_bytes_are_refused_under_the_given_location():
    with pytest.raises(InputError, match="image 3"):
        decode(b"nothing", "pack.npz: image 3")


def encoded(format: str) -> bytes:
    file = BytesIO()
    Image.effect_noise((24, 24), 50).convert("RGB").save(file, format)
    return file.getvalue()


ENCODED = {format: encoded(format) for format in FORMATS}


@pytest.mark.parametrize("format", FORMATS)
def test_every_promised_format_is_read_whatever_its_name(format: str, tmp_path) -> None:
    (tmp_path / "x.jpg").write_bytes(ENCODED[format])
    assert decode(tmp_path / "x.jpg", "x").size == decode(ENCODED[format], "x").size == (24, 24)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=8),
    st.integers(0, 5000),
)
def test_damaged_bytes_of_every_format_are_an_image_or_bad_input(format: str, changes, cut: int) -> None:
    data = bytearray(ENCODED[format])
    for position, value in changes:
        data[position % len(data)] = value
    try:
        outcome = decode(bytes(data[: len(data) - cut % len(data)]), "here").mode
    except InputError as error:
        outcome = str(error).partition(": ")[0]
    assert outcome in ("RGB", "here")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_bad_input(data: bytes) -> None:
    with pytest.raises(InputError):
        decode(data, "here")


def png(width: int, height: int) -> bytes:
    """The header of an image of that size, and hardly any pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_000, 10_000, 20_000, 65_000])
def test_an_image_with_too_many_pixels_is_an_error_and_no_warning(side: int, recwarn) -> None:
    with pytest.raises(InputError, match=f"pixels.*{MAX_PIXELS}|{MAX_PIXELS}"):
        decode(png(side, side), "here")
    assert not recwarn.list


def test_the_limit_holds_in_threads() -> None:
    errors = []

    def read() -> None:
        try:
            decode(png(10_000, 10_000), "here")
        except InputError as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 8


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def test_an_eps_with_the_name_of_a_photograph_starts_no_ghostscript(tmp_path, monkeypatch) -> None:
    """Through the command line: Pillow itself would hand the file to an interpreter of programs."""
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append(1))
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            (tmp_path / "pets" / split / name / "1.jpg").write_bytes(EPS)
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE.replace("builtin:digits", f"folder:{tmp_path}/pets"), encoding="utf-8")
    result = r1export("train", recipe, "--out", tmp_path / "run")
    assert result.returncode == 2, result.output
    assert "cannot be read as an image" in result.stderr.replace("\n", " ")
    assert started == []
    assert not (tmp_path / "run").exists()


def test_a_broken_jpeg_ends_the_command_with_one_line_and_exit_code_2(tmp_path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            (tmp_path / "pets" / split / name / "1.jpg").write_bytes(ENCODED["JPEG"])
    (tmp_path / "pets/test/dog/1.jpg").write_bytes(ENCODED["JPEG"][:-200])
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE.replace("builtin:digits", f"folder:{tmp_path}/pets"), encoding="utf-8")
    result = r1export("train", recipe, "--out", tmp_path / "run")
    assert result.returncode == 2, result.output
    assert "pets/test/dog/1.jpg" in result.stderr.replace("\n", "")


def test_a_folder_or_a_pipe_with_the_name_of_an_image_is_refused_without_waiting(tmp_path) -> None:
    import os

    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in ("folder.jpg", "pipe.jpg"):
        with pytest.raises(InputError, match=name):
            decode(tmp_path / name, str(tmp_path / name))


def test_a_source_in_other_formats_is_refused_by_the_name_of_the_image(tmp_path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{i}.png", "PCX")
    task = load_task(Request(f"folder:{tmp_path}"))
    with pytest.raises(InputError, match=r"cat/\d\.png"):
        task.train.read(0)
