"""Offline tasks that are drawn or from scikit-learn, and the small base model of the drawn world.

`builtin:world` (coloured shapes, see scripts/make_world_base.py) measures what the base model can do without training.
`builtin:patterns`, `builtin:arrows`, `builtin:digits` (real scans) and `builtin:photos` (pieces of two real photographs) are
new to it.
Image i of a split is a pure function of (task, split, i): drawn when read, the same on every machine.
"""

from __future__ import annotations

import colorsys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from r1export.data.packed import PACKS, load_packed
from r1export.data.photos import load_photos
from r1export.data.request import Request
from r1export.data.task import ImageSet, Task
from r1export.errors import InputError

SIZE = 32  # pixels per side, what the packaged base model reads
_ZOOM = 3  # shapes are drawn this much larger and averaged down: antialiasing


Draw = Callable[[str, np.random.Generator], Image.Image]  # an image of a class


class ModelFiles(NamedTuple):
    """A base model on disk: fp16 safetensors weights and their open_clip config."""

    weights: Path
    config: Path


_HERE = Path(__file__).parent / "builtin"
BUILTIN_MODELS = {
    name: ModelFiles(_HERE / f"{file}.safetensors", _HERE / f"{file}.json")
    for name, file in (("world", "world-s32"), ("photo", "photo-lite0-128"), ("photo-vit", "photo-vit-128"))
}

# Hue range in degrees, saturation range, value range.
COLOURS = {
    "red": ((-8, 6), (0.8, 1.0), (0.7, 1.0)),
    "orange": ((24, 34), (0.85, 1.0), (0.9, 1.0)),
    "yellow": ((53, 61), (0.75, 1.0), (0.85, 1.0)),
    "green": ((100, 140), (0.6, 1.0), (0.5, 0.9)),
    "cyan": ((178, 190), (0.6, 1.0), (0.8, 1.0)),
    "blue": ((218, 240), (0.7, 1.0), (0.7, 1.0)),
    "purple": ((268, 284), (0.6, 1.0), (0.5, 0.9)),
    "pink": ((322, 338), (0.35, 0.6), (0.9, 1.0)),
}


def _regular(corners: int, turn: float = 0.0, radii: tuple[float, ...] = (1.0,)) -> np.ndarray:
    """Corners (n, 2) of a regular polygon whose first corner points up; `radii` alternate from corner to corner."""
    angle = 2 * np.pi * np.arange(corners) / corners - np.pi / 2 + turn
    radius = np.resize(radii, corners)[:, None]
    outline: np.ndarray = radius * np.stack([np.cos(angle), np.sin(angle)], 1)
    return outline


def _heart() -> np.ndarray:
    t = 2 * np.pi * np.arange(28) / 28
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([16 * np.sin(t) ** 3, y], 1) / 16


def _crescent() -> np.ndarray:
    t = np.linspace(-2.3, 2.3, 16)
    outer = np.stack([-np.cos(t), np.sin(t)], 1)
    inner = np.stack([0.45 - 0.75 * np.cos(t[::-1]), 0.97 * np.sin(t[::-1])], 1)
    return np.concatenate([outer, inner]) * 0.95


_CROSS = [(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)]
_ARROW = np.array([(10, 0), (1, -8), (1, -3), (-10, -3), (-10, 3), (1, 3), (1, 8)]) / 10  # points right

# Outlines of radius about 1; y grows downwards.
SHAPES = {
    "circle": _regular(24) * 0.9,
    "square": _regular(4, np.pi / 4) * 1.1,
    "triangle": np.array([(0, -1.2), (0.85, 0.8), (-0.85, 0.8)]),
    "star": _regular(10, radii=(1.15, 0.45)),
    "cross": np.array(_CROSS) / 3.0,
    "heart": _heart(),
    "crescent": _crescent(),
    "diamond": _regular(4, radii=(1.25, 0.6)),
}

# Shapes that look different each way up are shown all eight ways.
FACING = ("north", "north east", "east", "south east", "south", "south west", "west", "north west")
TURNING_SHAPES = ("triangle", "heart", "crescent")

PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
# One pair per colour and per shape that pre-training never shows: naming them takes composition, not memory.
UNSEEN_PAIRS = tuple((colour, list(SHAPES)[(3 * k + 1) % 8]) for k, colour in enumerate(COLOURS))


@dataclass(frozen=True)
class Scene:
    """What a caption may say about one image of the world."""

    colour: str
    shape: str
    size: str  # small, large
    style: str  # solid, outlined
    background: str  # dark, light
    facing: str  # one of FACING; "" for a shape that does not turn


def image_rng(name: str, split: str, index: int) -> np.random.Generator:
    """The random numbers of one image and of no other."""
    return np.random.Generator(np.random.PCG64([zlib.crc32(f"{name}/{split}".encode()), index]))


def _between(low: float, high: float, u: float) -> float:
    return low + (high - low) * u


def noisy(pixels: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Pixels (SIZE, SIZE, 3) in 0..255 with sensor noise of up to 12 grey levels."""
    noise = np.frombuffer(rng.bytes(pixels.size), np.uint8).reshape(pixels.shape) % 25
    return Image.fromarray(np.clip(pixels.astype(np.int16) + noise - 12, 0, 255).astype(np.uint8))


def _polygon(outline: np.ndarray, ink: tuple[int, ...], paper: tuple[int, ...], stroke: int = 0) -> np.ndarray:
    """Pixels (SIZE, SIZE, 3) of an outline (n, 2) in pixels: filled, or a line of `stroke` zoomed pixels."""
    image = Image.new("RGB", (SIZE * _ZOOM, SIZE * _ZOOM), paper)
    points = (outline * _ZOOM).ravel().tolist()
    if stroke:
        ImageDraw.Draw(image).line(points + points[:4], fill=ink, width=stroke, joint="curve")
    else:
        ImageDraw.Draw(image).polygon(points, fill=ink)
    return np.asarray(image.reduce(_ZOOM))


def _place(outline: np.ndarray, angle: float, radius: float, u: float, v: float) -> np.ndarray:
    """Turn by `angle` (radians), scale to `radius` pixels, and move within the image by (u, v in 0..1), so that all of it shows."""
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    space = SIZE - 2 * 1.1 * radius
    placed: np.ndarray = radius * outline @ turn + 1.1 * radius + np.array([u, v]) * max(space, 0)
    return placed


def draw_scene(colour: str, shape: str, rng: np.random.Generator) -> tuple[Image.Image, Scene]:
    """One coloured shape of random size, style, place and rotation on a greyish background, and what it is."""
    u = rng.random(15)
    hue, saturation, value = (_between(low, high, t) for (low, high), t in zip(COLOURS[colour], u, strict=False))
    ink = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value))
    dark, large, outlined = u[3:6] < (0.5, 0.5, 0.3)
    grey = _between(5, 60, u[6]) if dark else _between(150, 205, u[6])
    paper = tuple(round(grey + 50 * tint) for tint in u[7:10])
    radius = _between(10, 13.5, u[10]) if large else _between(6.5, 8.5, u[10])
    way = int(8 * u[14]) if shape in TURNING_SHAPES else 0
    angle = np.radians(_between(-20, 20, u[11]) - 45 * way)
    outline = _place(SHAPES[shape], angle, radius, u[12], u[13])
    pixels = _polygon(outline, ink, paper, stroke=round(0.2 * radius * _ZOOM) if outlined else 0)
    words = ("large" if large else "small", "outlined" if outlined else "solid", "dark" if dark else "light")
    return noisy(pixels, rng), Scene(colour, shape, *words, FACING[way] if shape in TURNING_SHAPES else "")


def two_colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Ink and paper (3,) in 0..255, at least 90 grey levels apart."""
    ink, paper = rng.random((2, 3)) * 255
    if abs(ink.mean() - paper.mean()) < 90:
        paper = paper * 0.3 if ink.mean() > 127 else 255 - (255 - paper) * 0.3
    return ink, paper


def _wave(x: np.ndarray) -> np.ndarray:
    """A triangle wave of period 1 between -1 and 1."""
    wave: np.ndarray = 4 * np.abs(x - np.floor(x + 0.5)) - 1
    return wave


# Each pattern maps coordinates in periods to a height; above zero is ink.
_PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "horizontal stripes": lambda x, y: _wave(y) + 0 * x,
    "vertical stripes": lambda x, y: _wave(x) + 0 * y,
    "diagonal stripes": lambda x, y: _wave((x + y) / 1.4),
    "checks": lambda x, y: 2 * _wave(x / 1.5) * _wave(y / 1.5),
    "dots": lambda x, y: 0.8 * (np.cos(2 * np.pi * x / 1.2) + np.cos(2 * np.pi * y / 1.2) - 0.7),
    "grid": lambda x, y: np.maximum(_wave(x / 1.3), _wave(y / 1.3)) - 0.5,
    "rings": lambda x, y: _wave(np.hypot(x, y)),
    "zigzags": lambda x, y: _wave(y + 0.45 * _wave(x / 1.5)),
}


def _draw_pattern(name: str, rng: np.random.Generator) -> Image.Image:
    """A pattern with a period of 6 to 11 pixels in two random colours, slightly turned, anywhere in its phase."""
    ink, paper = two_colours(rng)
    u = rng.random(5)
    angle, period = np.radians(_between(-12, 12, u[0])), _between(6, 11, u[1])
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE * np.array([_between(0.3, 0.7, t) for t in u[2:4]])[:, None, None]
    if u[4] < 0.5:
        x = -x
    x, y = (np.cos(angle) * x - np.sin(angle) * y) / period, (np.sin(angle) * x + np.cos(angle) * y) / period
    cover = np.clip(0.5 + 0.25 * period * _PATTERNS[name](x, y), 0, 1)[..., None]
    return noisy(paper + cover * (ink - paper), rng)


_DIRECTIONS = ("right", "up right", "up", "up left", "left", "down left", "down", "down right")


def _draw_arrow(name: str, rng: np.random.Generator) -> Image.Image:
    """An arrow within 12 degrees of the direction, in two random colours."""
    ink, paper = two_colours(rng)
    u = rng.random(4)
    angle = np.radians(45 * _DIRECTIONS.index(name) + _between(-12, 12, u[0]))
    outline = _place(_ARROW, angle, _between(9, 13, u[1]), u[2], u[3])
    return noisy(_polygon(outline, tuple(map(round, ink)), tuple(map(round, paper))), rng)


def _draw_pair(name: str, rng: np.random.Generator) -> Image.Image:
    colour, shape = name.split()
    return draw_scene(colour, shape, rng)[0]


def _drawn(task: str, split: str, classes: tuple[str, ...], draw: Draw, count: int) -> ImageSet:
    """`count` images; image i shows class i modulo the number of classes, so every prefix is balanced."""

    def read(index: int) -> Image.Image:
        return draw(classes[index % len(classes)], image_rng(task, split, index))

    return ImageSet.drawn(np.arange(count) % len(classes), read)


def _drawn_task(name: str, classes: tuple[str, ...], template: str, draw: Draw, train: int, test: int) -> Task:
    """`train` and `test` are images per class."""
    sets = [_drawn(name, split, classes, draw, n * len(classes)) for split, n in (("train", train), ("test", test))]
    return Task(name, classes, (template,), train=sets[0], test=sets[1])


@cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's scanned digits: images (1797, 8, 8) with values 0..16, labels (1797,)."""
    from sklearn.datasets import load_digits  # imported here: it takes a second

    data = load_digits()
    return data.images, data.target.astype(np.int64)


def _read_scan(start: int, index: int) -> Image.Image:
    pixels = np.rint(_scans()[0][start + index] * (255 / 16)).astype(np.uint8)
    return Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB")


def _digits() -> Task:
    """The scans lie in the order of their writers: the last 360 are kept for the test, so most of its hands are new."""
    labels, cut = _scans()[1], 1437
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    train, test = (
        ImageSet.drawn(labels[:cut], partial(_read_scan, 0)),
        ImageSet.drawn(labels[cut:], partial(_read_scan, cut)),
    )
    return Task("digits", words, ("the digit {}.",), train, test)


_TASKS: dict[str, Callable[[], Task]] = {
    "world": lambda: _drawn_task("world", tuple(map(" ".join, PAIRS)), "a {}.", _draw_pair, 32, 6),
    "patterns": lambda: _drawn_task("patterns", tuple(_PATTERNS), "a pattern of {}.", _draw_pattern, 100, 40),
    "arrows": lambda: _drawn_task("arrows", _DIRECTIONS, "an arrow pointing {}.", _draw_arrow, 100, 40),
    "digits": _digits,
    "photos": load_photos,
    **{name: partial(load_packed, name) for name in PACKS},
}


def read(request: Request) -> Task:
    """The reader of `builtin:NAME`."""
    return load_builtin(request.address)


def load_builtin(name: str) -> Task:
    """The task `builtin:NAME`. Raises `InputError` for a name that is not known."""
    if name not in _TASKS:
        raise InputError(f"unknown built-in task {name!r}", f"known: {', '.join(_TASKS)}")
    return _TASKS[name]()
