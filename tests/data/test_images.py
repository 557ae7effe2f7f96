"""Images are decoded from the promised formats alone; whatever is damaged is one line that names it."""

import struct
import threading
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import EpsImagePlugin, ExifTags, Image, ImageOps
from running import RECIPE, r1export

from r1export.adapt.clip import Preprocess
from r1export.data.images import FORMATS, MAX_PIXELS, UPRIGHT_RGB, Decoding, decode, images_from_files
from r1export.data.request import Request
from r1export.data.sources import load_task
from r1export.data.task import Picture
from r1export.errors import InputError


def levels(mode: str = "RGB") -> Image.Image:
    """A ramp, three rows of four pixels, in any mode that Pillow can convert to."""
    ramp = Image.fromarray(np.linspace(0, 255, 12).astype(np.uint8).reshape(3, 4))
    return ramp.convert("RGB").quantize(12) if mode == "P" else ramp.convert(mode)


def read_back(image: Image.Image, format: str = "PNG", decoding: Decoding = UPRIGHT_RGB, **options) -> Picture:
    file = BytesIO()
    image.save(file, format, **options)
    return decode(file.getvalue(), "here", decoding)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA"])
def test_a_picture_of_every_common_mode_has_the_colors_that_pillow_shows(mode) -> None:
    picture = read_back(levels(mode))
    assert picture.image.mode == "RGB"
    assert np.array_equal(picture.image, levels(mode).convert("RGB"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_exif_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture = read_back(levels(), exif=exif)
    upright = ImageOps.exif_transpose(Image.open(BytesIO(tagged(levels(), exif))))
    assert np.array_equal(picture.image, upright)
    assert picture.image.size == ((3, 4) if orientation > 4 else (4, 3))
    assert picture.changes == (() if orientation == 1 else ("rotated by EXIF orientation",))


def tagged(image: Image.Image, exif: Image.Exif) -> bytes:
    file = BytesIO()
    image.save(file, "PNG", exif=exif)
    return file.getvalue()


def test_transparency_shows_the_fill_color_and_not_what_is_stored_under_it() -> None:
    image = Image.new("RGBA", (2, 1), (200, 100, 50, 255))
    image.putpixel((1, 0), (255, 255, 255, 0))
    picture = read_back(image, decoding=Decoding(fill=(1, 2, 3)))
    assert [picture.image.getpixel((x, 0)) for x in range(2)] == [(200, 100, 50), (1, 2, 3)]
    assert picture.changes == ("transparency composited",)


def test_a_palette_with_a_transparent_entry_is_composited_too() -> None:
    image = levels("RGB").quantize(4)
    picture = read_back(image, transparency=image.getpixel((0, 0)), decoding=Decoding(fill=(9, 9, 9)))
    assert picture.image.getpixel((0, 0)) == (9, 9, 9)
    assert picture.changes == ("transparency composited",)


def test_gray_of_16_bits_is_scaled_by_its_range_and_not_clipped() -> None:
    image = Image.fromarray(np.array([[0, 257, 40_000, 65_535]], np.uint16))
    picture = read_back(image)
    assert [picture.image.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 156, 255]
    assert picture.changes == ("16-bit gray scaled by its range",)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_gray_of_32_bits_is_scaled_from_its_least_to_its_largest_value(dtype) -> None:
    picture = read_back(Image.fromarray(np.array([[-1000, 0, 3000]], dtype)), "TIFF")
    assert [picture.image.getpixel((x, 0))[0] for x in range(3)] == [0, 64, 255]
    assert picture.changes == ("32-bit gray scaled by its range",)


def test_cmyk_is_converted_by_pillows_formula_without_a_profile() -> None:
    image = Image.merge("CMYK", [levels("L")] * 3 + [Image.new("L", (4, 3), 10)])
    picture = read_back(image, "TIFF")
    assert np.array_equal(picture.image, image.convert("RGB"))
    assert picture.changes == ("CMYK converted",)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_read(format: str) -> None:
    first, second = levels(), ImageOps.mirror(levels())
    options = {"lossless": True} if format == "WEBP" else {}
    picture = read_back(first, format, save_all=True, append_images=[second], **options)
    assert np.abs(np.asarray(picture.image, int) - np.asarray(first, int)).max() <= 1
    assert "first frame of several" in picture.changes


def test_an_mpo_of_a_camera_is_the_photograph_without_its_previews() -> None:
    picture = read_back(levels(), "MPO", save_all=True, append_images=[levels()], quality=100)
    assert (picture.image.size, picture.changes) == ((4, 3), ())


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "I;16"])
def test_a_picture_of_a_single_value_is_refused_in_any_mode(mode: str) -> None:
    with pytest.raises(InputError, match=r"here: every pixel has the same value .*skip_broken"):
        read_back(Image.new(mode, (5, 5), 7))


def test_damaged_exif_turns_nothing() -> None:
    picture = read_back(levels(), exif=b"Exif\0\0MM\0*\0\0\xff\xff\0\1")
    assert np.array_equal(picture.image, levels())


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "LA", "1"])
@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
def test_open_clips_decoding_is_that_of_its_transform_bit_for_bit(mode: str, resize_mode: str, tmp_path) -> None:
    noise = Image.effect_noise((40, 23), 80).convert("RGB")
    noise = noise.quantize(50) if mode == "P" else noise.convert(mode)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    noise.save(tmp_path / "a.png", exif=exif)
    config = PreprocessCfg(size=16, resize_mode=resize_mode)
    expected = image_transform_v2(config, is_train=False)(Image.open(tmp_path / "a.png"))
    preprocess = Preprocess(config)
    pixels = preprocess.crop(decode(tmp_path / "a.png", "a", Decoding("open_clip")).image)
    assert torch.equal(preprocess.normalize(torch.from_numpy(pixels)[None])[0], expected)


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
    assert decode(tmp_path / "x.jpg", "x").image.size == decode(ENCODED[format], "x").size == (24, 24)


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
        outcome = decode(bytes(data[: len(data) - cut % len(data)]), "here").image.mode
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
    assert "not an image in a supported format" in result.stderr.replace("\n", " ")
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
