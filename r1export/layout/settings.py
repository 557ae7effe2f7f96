"""Preprocessing and padding settings of a release, for the configs of clients."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import ModelProto

from r1export.errors import InputError, Unsupported, first_line
from r1export.update.atomic_io import read_regular
from r1export.update.release_layout import PREPROCESS, TOKENIZER
from r1export.verify.client_files import ClientTokenizer, PreprocessConfig

MAX_JSON = 1 << 28  # bytes of a tokenizer.json
LONG = (
    "a photo of cats, ",
    "7 dogs & 5 birds. ",
    "rot grün blau ",
)  # texts that end in different ids where they are cut
PILLOW = {"bicubic": 3, "random": 3, "bilinear": 2}  # Pillow's numbers of filters, which clients' configs use


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a release. Raises InputError."""
    try:
        value = json.loads(read_regular(path, MAX_JSON))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: {first_line(error)}", "copy it from the release it belongs to") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object", "copy it from the release it belongs to")
    return value


@dataclass(frozen=True)
class Preprocessing:
    """preprocess.json for clients that resize by the shorter side to a square and crop its middle, or squash."""

    config: PreprocessConfig

    @classmethod
    def read(cls, release: Path) -> Preprocessing:
        """Raises InputError."""
        if not (release / PREPROCESS).is_file():
            raise InputError(f"{release} has no {PREPROCESS}", "use a complete release")
        return cls(PreprocessConfig.read(release))

    def check_for(self, client: str) -> None:
        """Raises Unsupported if `client` cannot prepare pictures like this."""
        height, width = self.config.size
        if self.config.resize_mode == "longest" or (self.config.resize_mode == "shortest" and height != width):
            raise Unsupported(
                f"{client} does not support the preprocessing: {self.config.resize_mode} side to {height} x {width}",
                "use a model that crops squares or squashes, or compute pixel_values yourself",
            )

    def processor(self, kind: str) -> dict[str, Any]:
        """preprocessor_config.json as transformers writes it, for the class `kind`."""
        height, width = self.config.size
        squash = self.config.resize_mode == "squash"
        size: dict[str, int] = {"height": height, "width": width}
        return {
            "image_processor_type": kind,
            "do_convert_rgb": True,
            "do_resize": True,
            "size": size if squash else {"shortest_edge": height},
            "resample": PILLOW[self.config.interpolation],
            "do_center_crop": not squash,
            "crop_size": size,
            "do_rescale": True,
            "rescale_factor": self.config.scale,
            "do_normalize": True,
            "image_mean": list(self.config.mean),
            "image_std": list(self.config.std),
        }


@dataclass(frozen=True)
class Texts:
    """How texts are padded: to `length` ids with `pad_id`, on the `left` or after the text.

    `end_id` is the last id of every text that is too long; None where there is no such token.
    """

    length: int
    pad_id: int
    left: bool
    end_id: int | None

    @classmethod
    def read(cls, release: Path, textual: ModelProto) -> Texts:
        """From the release's tokenizer and the input of its textual graph. Raises InputError, Unsupported."""
        length = textual.graph.input[0].type.tensor_type.shape.dim[1].dim_value
        padding = read_json(release / TOKENIZER / "tokenizer.json").get("padding")
        if not isinstance(padding, dict) or not length:
            raise Unsupported(
                f"{release}: the text length is not fixed", "export it again with this version of r1export"
            )
        client = ClientTokenizer(release)
        ends = {int(row[-1]) for row in client([text * length for text in LONG])}
        end_id = ends.pop() if len(ends) == 1 else None
        return cls(length, int(padding["pad_id"]), padding.get("direction") == "Left", end_id)
