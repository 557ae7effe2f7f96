"""preprocess.onnx: open_clip's preprocessing as a graph, so that clients need no imaging library.

    image uint8 (height, width, 3), any size -> pixel_values float32 (1, 3, H, W)

Resized as bytes with the antialiased filters of Pillow, which is what open_clip's transform resizes with: what lies
outside the image has no weight. Then cropped and normalised in its order of operations. docs/models.md says how often a
byte differs on real images, and by how much.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from onnx import parser

from r1export.errors import Unsupported
from r1export.update.atomic_io import write_file

FILTERS = {
    "bicubic": 'mode="cubic", cubic_coeff_a=-0.5',
    "random": 'mode="cubic", cubic_coeff_a=-0.5',
    "bilinear": 'mode="linear"',
}  # a = -0.5 is Pillow's

SHORTEST = """
    sides = Shape <start=0, end=2> (image)
    short = ReduceMin <keepdims=1> (sides)
    target = Constant <value_ints=[{height}, {width}]> ()
    scaled = Mul (sides, target)
    resized_sides = Div (scaled, short)
    excess = Sub (resized_sides, target)
    excess_float = Cast <to=1> (excess)
    half = Constant <value_float=0.5> ()
    middle = Mul (excess_float, half)
    rounded = Round (middle)
    start = Cast <to=7> (rounded)
    end = Add (start, target)
    axes = Constant <value_ints=[2, 3]> ()
"""
SQUASH = """
    resized_sides = Constant <value_ints=[{height}, {width}]> ()
"""
GRAPH = """<ir_version: {ir_version}, producer_name: "r1export", opset_import: ["": {opset}]>
preprocess (uint8[height, width, 3] image) => (float[1, 3, {height}, {width}] pixel_values) {{
    planes = Transpose <perm=[2, 0, 1]> (image)
    first = Constant <value_ints=[0]> ()
    batch = Unsqueeze (planes, first)
    {sides}
    leading = Constant <value_ints=[1, 3]> ()
    sizes = Concat <axis=0> (leading, resized_sides)
    resized = Resize <{filter}, antialias=1, exclude_outside=1, coordinate_transformation_mode="half_pixel"> (batch, , , sizes)
    cropped = {crop}
    values = Cast <to=1> (cropped)
    full = Constant <value_float=255.0> ()
    shares = Div (values, full)
    channels = Constant <value_ints=[1, 3, 1, 1]> ()
    mean_row = Constant <value_floats=[{mean}]> ()
    mean = Reshape (mean_row, channels)
    centred = Sub (shares, mean)
    std_row = Constant <value_floats=[{std}]> ()
    std = Reshape (std_row, channels)
    pixel_values = Div (centred, std)
}}
"""


def write_preprocess(config: Mapping[str, Any], path: Path, *, opset: int, ir_version: int = 8) -> None:
    """Write the graph for a release's preprocess.json (`size`, `mode`, `resize_mode`, `interpolation`, `mean`, `std`).

    Raises Unsupported: a mode, filter or resize mode that has no faithful graph; the release is complete without it.
    """
    height, width = config["size"]
    resize_mode = config["resize_mode"]
    if not has_graph(config):
        raise Unsupported(
            f"no preprocess.onnx for {config['mode']} {resize_mode} {config['interpolation']} {height}x{width}",
            "implement preprocess.json in the client",
        )
    text = GRAPH.format(
        ir_version=ir_version, opset=opset, height=height, width=width, filter=FILTERS[config["interpolation"]],
        sides=(SQUASH if resize_mode == "squash" else SHORTEST).format(height=height, width=width),
        crop="Identity (resized)" if resize_mode == "squash" else "Slice (resized, start, end, axes)",
        mean=_floats(config["mean"]), std=_floats(config["std"]),
    )  # fmt: skip
    model = parser.parse_model(text)
    onnx.checker.check_model(model, full_check=True)
    write_file(path, model.SerializeToString(deterministic=True))


def has_graph(config: Mapping[str, Any]) -> bool:
    """Whether `write_preprocess` has a faithful graph for this preprocess.json."""
    height, width = config["size"]
    resize_mode = config["resize_mode"]
    return (
        config["mode"] == "RGB"
        and config["interpolation"] in FILTERS
        and (resize_mode == "squash" or (resize_mode == "shortest" and height == width))
    )


def _floats(values: list[float]) -> str:
    return ", ".join(repr(float(value)) for value in values)
