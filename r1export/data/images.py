"""Decode image files and bytes to RGB, in the formats listed in docs/inputs.md only.

Images are decoded as a viewer shows them: the EXIF orientation is applied; the first frame of an animation is used; palette,
bilevel and CMYK images are converted before resizing; 16-bit gray is scaled by its range, 32-bit and floating-point gray by
the values of the image; transparency is composited on the fill color of the model.
`Decoding("open_clip")` keeps the stored mode, so that open_clip's own transform converts it after resizing.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from r1export.data.task import ImageSet, Picture
from r1export.errors import InputError, R1ExportError, first_line, refused

# Pillow detects the format by content. Without this list an EPS file named .jpg would start Ghostscript.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = frozenset(
    [
        ".apng",
        ".avif",
        ".bmp",
        ".dib",
        ".gif",
        ".jfif",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".mpo",
        ".pbm",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    ]
)
# Unsupported image formats, which are an error, unlike other files in a folder.
FOREIGN_SUFFIXES = frozenset(
    [
        ".arw",
        ".cr2",
        ".cr3",
        ".dng",
        ".eps",
        ".heic",
        ".heif",
        ".ico",
        ".j2k",
        ".jp2",
        ".jxl",
        ".nef",
        ".orf",
        ".psd",
        ".raf",
        ".raw",
        ".rw2",
        ".svg",
        ".tga",
    ]
)
MAX_PIXELS = 80_000_000  # 240 MB decoded; below Pillow's warning about decompression bombs

_REMEDY = "replace or remove the image, or set data.skip_broken = true"
_OWN_RANGE = frozenset({"I", "F"})  # gray without a fixed range
_warning_filter = threading.Lock()  # images are decoded in threads, where warnings.catch_warnings is not safe


@dataclass(frozen=True)
class Decoding:
    """How stored images become RGB: by the rule of this module, with the RGB `fill` under transparency, or as open_clip does."""

    rule: Literal["r1export", "open_clip"] = "r1export"
    fill: tuple[int, int, int] = (0, 0, 0)


UPRIGHT_RGB = Decoding()  # default without a model


def decode(source: Path | bytes, location: str, decoding: Decoding = UPRIGHT_RGB) -> Picture:
    """Decode an image file or its bytes to RGB, or for `Decoding("open_clip")` to its stored mode.

    Raises:
        InputError: not a regular file, none of FORMATS, corrupted, a single color, or more than MAX_PIXELS; the message
            begins with `location`.
        Unsupported: the file is not readable.
    """
    try:
        with _open(source) as image:
            if image.width * image.height <= MAX_PIXELS:
                return _convert(image, location, decoding)
            size = f"{image.width} x {image.height} pixels"
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        size = str(error)
    except (R1ExportError, MemoryError):
        raise
    except PermissionError as error:
        raise refused(error, location) from error
    except UnidentifiedImageError as error:
        raise InputError(f"{location}: not an image in a supported format ({', '.join(FORMATS)})", _REMEDY) from error
    except Exception as error:  # Pillow has no base error: each format raises its own exceptions for corrupted bytes
        raise InputError(f"{location}: cannot decode the image ({first_line(error, 80)})", _REMEDY) from error
    raise InputError(f"{location}: {size}, expected at most {MAX_PIXELS}", _REMEDY)


def _open(source: Path | bytes) -> Image.Image:
    """Read the header only. A size that Pillow would warn about is an error."""
    if isinstance(source, Path) and not source.is_file():
        raise FileNotFoundError("no such file")  # also for a pipe, which would block
    with _warning_filter, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)


def _convert(stored: Image.Image, location: str, decoding: Decoding) -> Picture:
    changes, size, mode = [], stored.size, stored.mode
    if getattr(stored, "n_frames", 1) > 1 and stored.format != "MPO":  # the other frames of an MPO are previews
        changes.append("first frame of several")
    stored.load()
    image, turned = _upright(stored)
    if turned:
        changes.append("rotated by EXIF orientation")
    rgb, change = _to_rgb(image, decoding.fill)
    if not np.ptp(np.asarray(rgb), axis=(0, 1)).any():
        raise InputError(f"{location}: every pixel has the same value", _REMEDY)
    if decoding.rule == "open_clip":
        return Picture(stored.copy(), location, size, mode)
    return Picture(rgb, location, size, mode, (*changes, change) if change else tuple(changes))


def _upright(image: Image.Image) -> tuple[Image.Image, bool]:
    """The image with its EXIF orientation applied; corrupted EXIF is ignored."""
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9):
            return ImageOps.exif_transpose(image), True
    except Exception:  # the EXIF parser raises various exceptions; the pixels are intact
        pass
    return image, False


def _to_rgb(image: Image.Image, fill: tuple[int, int, int]) -> tuple[Image.Image, str]:
    """The image as RGB, and the changes beyond a plain conversion after resizing; usually none."""
    if image.mode in _OWN_RANGE or image.mode.startswith("I;16"):
        return _gray(image).convert("RGB"), f"{16 if ';' in image.mode else 32}-bit gray scaled by its range"
    if image.has_transparency_data:
        background = Image.new("RGBA", image.size, (*fill, 255))
        return Image.alpha_composite(background, image.convert("RGBA")).convert("RGB"), "transparency composited"
    converted = image if image.mode == "RGB" else image.convert("RGB")
    return converted, {"P": "palette converted", "1": "bilevel converted", "CMYK": "CMYK converted"}.get(image.mode, "")


def _gray(image: Image.Image) -> Image.Image:
    """Gray of more than 8 bits as 8 bits, rounded: 0 to 65,535 become 0 to 255; 32 bits and floats from their least to their largest value."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("non-finite pixels")
    low, high = (values.min(), values.max()) if image.mode in _OWN_RANGE else (0.0, 65535.0)
    return Image.fromarray(np.rint((values - low) * (255 / max(high - low, np.finfo(float).tiny))).astype(np.uint8))


def images_from_files(files: Sequence[Path], labels: Sequence[int], decoding: Decoding = UPRIGHT_RGB) -> ImageSet:
    """One image per file, decoded on access."""
    return ImageSet(np.asarray(labels, np.int64), lambda i: decode(files[i], str(files[i]), decoding))
