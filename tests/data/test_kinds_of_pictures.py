"""Every kind of picture in docs/inputs.md, made here as a small real file: the pixels are those of the rule, and those of preprocess.onnx."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from open_clip.transform import PreprocessCfg
from PIL import ExifTags, Image

from r1export.adapt.clip import Preprocess
from r1export.data.images import Decoding, decode
from r1export.errors import InputError
from r1export.export.preprocess import write_preprocess

PAGE = Path(__file__).parents[2] / "docs" / "inputs.md"
FILL = (10, 200, 30)
HEIGHT, WIDTH = 30, 46


def colors(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Smooth colors with an edge, uint8 (height, width, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [127 + 100 * np.sin(x / 9 + c) * np.cos(y / (7 + c)) + 28 * (x > width / 2) for c in range(3)]
    return np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8)


def gray() -> np.ndarray:
    return colors()[..., 0]


def alpha() -> np.ndarray:
    return np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))


def composite(rgb: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """The rule for transparency, in floating point."""
    share = opacity[..., None] / 255
    return np.rint(rgb * share + np.array(FILL) * (1 - share)).astype(np.uint8)


def gray_rgb(levels: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(levels).astype(np.uint8)[..., None], 3, 2)


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[ExifTags.Base.Orientation] = orientation
    return found


def indexed() -> tuple[Image.Image, np.ndarray]:
    """A picture with a palette of 16 colors, and its colors."""
    image = Image.fromarray(colors()).quantize(16)
    return image, np.asarray(image.convert("RGB"))


def transparent_palette(path: Path) -> np.ndarray:
    image, rgb = indexed()
    image.save(path, "PNG", transparency=3)
    return composite(rgb, np.where(np.asarray(image) == 3, 0, 255))


def cmyk(path: Path) -> np.ndarray:
    inks = np.concatenate([255 - colors(), gray()[..., None] // 4], -1)
    Image.fromarray(inks, "CMYK").save(path, "TIFF")
    keep = 255 - inks[..., 3:].astype(int)
    return np.rint((255 - inks[..., :3].astype(int)) * keep / 255).astype(np.uint8)


def animation(path: Path) -> np.ndarray:
    first, rgb = indexed()
    first.save(path, "GIF", save_all=True, append_images=[first.rotate(180)])
    return rgb


@dataclass(frozen=True)
class Kind:
    """A kind of picture: `write` makes a file and returns the colors that it shows, by the rule. JPEG and WebP are within `near` levels."""

    write: Callable[[Path], np.ndarray]
    near: int = 0


def stored(pixels: np.ndarray, shown: np.ndarray, format: str = "PNG", **options) -> Callable[[Path], np.ndarray]:
    def write(path: Path) -> np.ndarray:
        Image.fromarray(pixels).save(path, format, **options)
        return shown

    return write


def deep(values: np.ndarray, format: str, shown: np.ndarray) -> Callable[[Path], np.ndarray]:
    return stored(values, gray_rgb(shown), format)


LEVELS16 = gray().astype(np.uint16) * 201 + 77
LEVELS32 = gray().astype(np.int32) * 1000 - 50_000
FLOATS = gray().astype(np.float32) / 255 - 0.5


def own_range(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    return np.rint((values - values.min()) / (values.max() - values.min()) * 255)


KINDS = {
    "color, 8 bits": Kind(stored(colors(), colors())),
    "gray": Kind(stored(gray(), gray_rgb(gray()))),
    "turned by EXIF": Kind(stored(colors(), np.rot90(colors(), -1), exif=exif(6))),
    "mirrored by EXIF": Kind(stored(colors(), colors()[:, ::-1], exif=exif(2))),
    "transparency": Kind(stored(np.dstack([colors(), alpha()]), composite(colors(), alpha())), near=1),
    "gray with transparency": Kind(stored(np.dstack([gray(), alpha()]), composite(gray_rgb(gray()), alpha())), near=1),
    "palette": Kind(lambda path: (indexed()[0].save(path, "PNG"), indexed()[1])[1]),
    "palette with a transparent entry": Kind(transparent_palette),
    "bilevel": Kind(stored(gray() > 127, gray_rgb((gray() > 127) * 255))),
    "gray, 16 bits": Kind(deep(LEVELS16, "PNG", np.rint(LEVELS16 / 65535 * 255))),
    "gray, 16 bits, TIFF": Kind(deep(LEVELS16, "TIFF", np.rint(LEVELS16 / 65535 * 255))),
    "gray, 32 bits": Kind(deep(LEVELS32, "TIFF", own_range(LEVELS32))),
    "gray, floating point": Kind(deep(FLOATS, "TIFF", own_range(FLOATS))),
    "CMYK": Kind(cmyk, near=1),
    "animation": Kind(animation),
    "MPO of a camera": Kind(
        stored(colors(), colors(), "MPO", save_all=True, append_images=[Image.fromarray(colors()[::-1])], quality=100),
        near=12,
    ),
    "JPEG": Kind(stored(colors(), colors(), "JPEG", quality=100, subsampling=0), near=6),
    "WebP": Kind(stored(colors(), colors(), "WEBP", lossless=True)),
    "AVIF": Kind(stored(colors(), colors(), "AVIF", quality=100), near=12),
    "thin": Kind(stored(colors(400, 3), colors(400, 3))),
    "wide": Kind(stored(colors(3, 400), colors(3, 400))),
}
REFUSED = {
    "truncated": lambda path: path.write_bytes(b"\xff\xd8\xff\xe0" + bytes(40)),
    "a single value": lambda path: Image.new("RGB", (9, 9), 5).save(path, "PNG"),
    "more than 80 million pixels": lambda path: Image.new("1", (9000, 9000)).save(path, "PNG"),
    "HEIC, JPEG 2000, SVG, raw": lambda path: Image.fromarray(colors()).save(path, "JPEG2000"),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_pixels_are_those_of_the_rule(name: str, tmp_path) -> None:
    shown = KINDS[name].write(tmp_path / "picture")
    found = np.asarray(decode(tmp_path / "picture", "picture", Decoding(fill=FILL)).image)
    assert found.shape == shown.shape
    assert np.abs(found.astype(int) - shown.astype(int)).max() <= KINDS[name].near


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("name", KINDS)
def test_a_client_with_preprocess_onnx_gets_the_pixels_of_training(name: str, resize_mode: str, tmp_path) -> None:
    KINDS[name].write(tmp_path / "picture")
    preprocess = Preprocess(PreprocessCfg(size=16, resize_mode=resize_mode))
    write_preprocess(preprocess.to_json(), tmp_path / "preprocess.onnx", opset=20)
    image = decode(tmp_path / "picture", "picture", Decoding(fill=FILL)).image
    session = ort.InferenceSession(tmp_path / "preprocess.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {"image": np.asarray(image)})[0][0]
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (preprocess.config.mean, preprocess.config.std))
    levels = (found * std + mean) * 255
    assert np.abs(levels - preprocess.crop(image)).max() <= 2


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_name(name: str, tmp_path) -> None:
    REFUSED[name](tmp_path / "picture")
    with pytest.raises(InputError, match=r"picture.*replace or remove the image"):
        decode(tmp_path / "picture", "picture")


def test_the_page_lists_these_kinds_and_no_others() -> None:
    section = PAGE.read_text(encoding="utf-8").split("## Pictures\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \|", section, re.M)
    assert [row for row in rows if row not in ("a picture", "---")] == [*KINDS, *REFUSED]
