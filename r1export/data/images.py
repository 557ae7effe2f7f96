"""Image files and bytes, decoded to RGB: the formats that docs/recipe.md promises, and no others."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from r1export.data.task import ImageSet
from r1export.errors import InputError

# Pillow goes by a file's bytes, not by its name. Without this list an EPS named .jpg would start Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
MAX_PIXELS = 80_000_000  # 240 MB once decoded; below the size at which Pillow warns of a decompression bomb

_REMEDY = "replace the image or remove it"
_warning_filter = threading.Lock()  # images are decoded in threads, and warnings.catch_warnings is not safe in them


def decode(source: Path | bytes, location: str) -> Image.Image:
    """The image in a file or in its bytes, as RGB.

    Raises:
        InputError: not a regular file, none of FORMATS, damaged, or more than MAX_PIXELS; the message begins with `location`.
    """
    try:
        with _open(source) as image:
            if image.width * image.height <= MAX_PIXELS:
                return image.convert("RGB")
            size = f"{image.width} x {image.height} pixels"
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        size = str(error)
    except Exception as error:  # Pillow has no base error: each format raises what its parser meets in damaged bytes
        raise InputError(f"{location}: cannot be read as an image ({type(error).__name__})", _REMEDY) from error
    raise InputError(f"{location}: {size}, expected at most {MAX_PIXELS}", _REMEDY)


def _open(source: Path | bytes) -> Image.Image:
    """The header is read, pixels are not. A size that Pillow would warn of is an error."""
    if isinstance(source, Path) and not source.is_file():
        raise FileNotFoundError(source)  # also for a pipe, from which reading would never return
    with _warning_filter, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)


def images_from_files(files: Sequence[Path], labels: Sequence[int]) -> ImageSet:
    """One image per file, decoded when it is read."""
    return ImageSet(np.asarray(labels, np.int64), lambda i: decode(files[i], str(files[i])))
