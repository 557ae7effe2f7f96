"""Checks of the files that clients read: preprocessing applied to golden images, the tokenizer applied to golden prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from PIL import Image
from pydantic import ConfigDict, TypeAdapter, ValidationError
from tokenizers import Tokenizer

from r1export.errors import InputError, first_line
from r1export.update.golden_samples import BYTES, MEAN_BYTES, PICTURES, SAMPLES, GoldenSamples
from r1export.update.release_layout import PREPROCESS, PREPROCESS_GRAPH, TOKENIZER
from r1export.verify.results import Check
from r1export.verify.runtimes.runtime import open_session, runner

T = TypeVar("T")
REMEDY = "export the release again"
RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "random": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
EXACT = 1e-5  # of preprocess.json, in units of pixel_values: rounding of float32
MAX_SIDE = 4096  # pixels
SMALLEST = 1e-6  # of scale and std: what is divided by it stays finite
BATCH = 64  # prompts encoded at a time
FIRST_MERGE = 512  # CLIP's vocabulary: 256 bytes, 256 bytes that end a word, then one entry for each merge


@dataclass(frozen=True)
class PreprocessConfig:
    """preprocess.json: the preprocessing of the image tower. Sizes in pixels, height first."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    size: tuple[int, int]
    mode: Literal["RGB"]
    resize_mode: Literal["shortest", "longest", "squash"]
    interpolation: Literal["bicubic", "bilinear", "random"]
    fill_color: int | tuple[int, int, int]
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    layout: Literal["NCHW"]

    def __post_init__(self) -> None:
        """Raises ValueError for impossible values."""
        if not all(0 < side <= MAX_SIDE for side in self.size):
            raise ValueError(f"size is {self.size}, expected 1 to {MAX_SIDE} pixels")
        if not all(math.isfinite(value) and value >= SMALLEST for value in (self.scale, *self.std)):
            raise ValueError(f"scale is {self.scale} and std {self.std}, expected {SMALLEST:g} or more")

    @classmethod
    def read(cls, release: Path) -> PreprocessConfig:
        """Raises InputError."""
        return _read(cls, release / PREPROCESS)

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """An image, uint8 (h, w, 3), as float32 (3, H, W)."""
        return self.normalize(self.crop(Image.fromarray(picture)))

    def crop(self, image: Image.Image) -> np.ndarray:
        """An upright RGB image, resized and cropped to uint8 (H, W, 3)."""
        height, width = self.size
        image = self._resized(image)
        fill = (self.fill_color,) * 3 if isinstance(self.fill_color, int) else self.fill_color
        canvas = Image.new("RGB", (width, height), fill)
        canvas.paste(image, (-_middle(image.width, width), -_middle(image.height, height)))
        return np.asarray(canvas)

    def normalize(self, crops: np.ndarray) -> np.ndarray:
        """uint8 (..., H, W, 3) as float32 (..., 3, H, W)."""
        values = crops.astype(np.float32) * np.float32(self.scale)
        mean, std = (np.array(value, np.float32) for value in (self.mean, self.std))
        normalized: np.ndarray = (values - mean) / std
        return np.ascontiguousarray(np.moveaxis(normalized, -1, -3))

    def _resized(self, image: Image.Image) -> Image.Image:
        """As torchvision for a square by the shorter side, and as open_clip otherwise."""
        height, width = self.size
        if self.resize_mode == "squash":
            return image.resize((width, height), RESAMPLING[self.interpolation])
        ratios = image.width / width, image.height / height
        ratio = min(ratios) if self.resize_mode == "shortest" else max(ratios)
        fit = int if self.resize_mode == "shortest" and height == width else round
        sizes = fit(image.width / ratio), fit(image.height / ratio)
        ignored = self.resize_mode == "shortest" and height != width  # open_clip passes no filter here
        return image.resize(sizes, RESAMPLING["bicubic" if ignored else self.interpolation])


def _first_fault(error: OSError | ValidationError) -> str:
    """The first invalid member."""
    if isinstance(error, OSError):
        return first_line(error)
    fault = error.errors()[0]
    member = ".".join(map(str, fault["loc"]))
    return f"{member}: {fault['msg']}" if member else fault["msg"]


def _middle(length: int, target: int) -> int:
    """Offset of a centred crop; negative for padding."""
    return round((length - target) / 2) if length >= target else -((target - length) // 2)


def check_preprocess(release: Path, golden: GoldenSamples, graph_required: bool) -> Check:
    """Check that preprocess.json, and preprocess.onnx if present, turn every golden image into its pixel_values.

    Counts are pairs of an image and a file. Raises InputError, CheckFailed if a file is unusable.
    """
    config = PreprocessConfig.read(release)
    byte = config.scale / min(config.std)
    ways: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float, float]] = {
        PREPROCESS: (config.apply, EXACT, EXACT)
    }
    if graph_required or (release / PREPROCESS_GRAPH).exists():
        ways[PREPROCESS_GRAPH] = (_graph(release), BYTES * byte, MEAN_BYTES * byte)
    problems = [
        problem
        for name, (apply, most, mean) in ways.items()
        for i, picture in enumerate(golden.pictures)
        for problem in _differences(f"{name}: image {i}", apply(picture), golden.pixel_values[i], most, mean)
    ]
    looked_at, detail = len(ways) * len(golden.pictures), f"{' and '.join(ways)} give the stored pixel_values"
    return Check.judge(problems, looked_at=looked_at, of=len(ways) * PICTURES, detail=detail)


def _graph(release: Path) -> Callable[[np.ndarray], np.ndarray]:
    run = runner(open_session(release / PREPROCESS_GRAPH))
    return lambda picture: run({"image": picture})[0]


def _differences(name: str, values: np.ndarray, expected: np.ndarray, most: float, mean: float) -> Iterator[str]:
    if values.shape != expected.shape:
        yield f"{name} has shape {values.shape}, expected {expected.shape}"
        return
    errors = np.abs(values.astype(np.float64) - expected)
    if not (errors.max() <= most and errors.mean() <= mean):  # false for NaN
        yield f"{name} differs by up to {errors.max():.2g}, {errors.mean():.2g} on average; allowed {most:.2g} and {mean:.2g}"


@dataclass(frozen=True)
class TokenizerModel:
    """The vocabulary in tokenizer.json; unigram models list (token, score)."""

    type: str
    vocab: dict[str, int] | list[tuple[str, float]]
    merges: tuple[str | tuple[str, str], ...] = ()


@dataclass(frozen=True)
class TokenizerFile:
    """The part of tokenizer.json that is compared with the other files."""

    model: TokenizerModel


def _by_library(name: str, call: Callable[[], T]) -> T:
    """Call the `tokenizers` library. Raises InputError for its plain Exceptions and for panics."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise InputError(
            f"{name}: {str(error).splitlines()[0][:200] if str(error) else type(error).__name__}", REMEDY
        ) from error


class ClientTokenizer:
    """tokenizer/tokenizer.json, loaded with the `tokenizers` library."""

    def __init__(self, release: Path) -> None:
        """Raises InputError if it is unreadable."""
        path = str(release / TOKENIZER / "tokenizer.json")
        self.tokenizer: Tokenizer = _by_library(path, lambda: Tokenizer.from_file(path))

    def __call__(self, prompts: list[str]) -> np.ndarray:
        """int64 (n, L). Raises InputError if it cannot encode them, or does not pad all of them to one length."""
        encodings = _by_library("tokenizer.json", lambda: self.tokenizer.encode_batch(prompts))
        rows = [encoding.ids for encoding in encodings]
        if len({len(row) for row in rows}) > 1:
            raise InputError("tokenizer.json pads prompts to different lengths", REMEDY)
        return np.array(rows, np.int64)


def check_tokenizer(release: Path, golden: GoldenSamples) -> Check:
    """Check that tokenizer.json gives the input_ids of every golden prompt, and that the other tokenizer files agree with it.

    Counts are prompts. Raises InputError if a file is unreadable.
    """
    problems = list(_vocabulary_problems(release / TOKENIZER))
    client = ClientTokenizer(release)
    problems += _config_problems(release / TOKENIZER, client.tokenizer, golden.input_ids)
    if golden.prompts:
        ids = client(list(golden.prompts))
        same = ids.shape == golden.input_ids.shape and (ids == golden.input_ids).all(1)
        if not np.all(same):
            first = golden.prompts[int(np.argmin(same))]
            problems.append(f"tokenizer.json gives wrong input_ids, first for {first[:60]!r}")
    detail = "tokenizer.json gives the input_ids of the golden prompts"
    return Check.judge(problems, looked_at=len(golden.prompts), of=SAMPLES, detail=detail)


def _vocabulary_problems(folder: Path) -> Iterator[str]:
    """Differences of vocab.json and merges.txt, if present, from tokenizer.json, and of its order from CLIP's."""
    model = _read(TokenizerFile, folder / "tokenizer.json").model
    vocab, merges = model.vocab, [_pair(merge) for merge in model.merges]
    if (folder / "vocab.json").exists() and _read(dict[str, int], folder / "vocab.json") != vocab:
        yield "vocab.json differs from the vocabulary of tokenizer.json"
    if (folder / "merges.txt").exists():
        lines = (folder / "merges.txt").read_text("utf-8", "replace").splitlines()[1:]
        if [_pair(line) for line in lines] != merges:
            yield "merges.txt differs from the merges of tokenizer.json"
    if model.type == "BPE" and isinstance(vocab, dict) and len(vocab) == FIRST_MERGE + len(merges) + 2:
        letters = byte_letters()
        order = [*letters, *(f"{letter}</w>" for letter in letters), *(left + right for left, right in merges)]
        misplaced = (token for i, token in enumerate(order) if vocab.get(token) != i)
        yield from (
            f"vocabulary entry {token!r} is {vocab.get(token)}, which differs from CLIP's order"
            for token in islice(misplaced, 1)
        )


def byte_letters() -> list[str]:
    """The 256 characters that represent bytes in CLIP's vocabulary, in its order: printable ones first, as themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]


def _config_problems(folder: Path, tokenizer: Tokenizer, input_ids: np.ndarray) -> Iterator[str]:
    """Differences of tokenizer_config.json, if present, from tokenizer.json and the golden `input_ids` (n, L)."""
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return
    config, padding, truncation = _read(dict[str, object], path), tokenizer.padding or {}, tokenizer.truncation or {}
    for name, actual in (
        ("model_max_length", truncation.get("max_length")),
        ("pad_token_id", padding.get("pad_id")),
    ):
        if actual is not None and config.get(name, actual) != actual:
            yield f"tokenizer_config.json: {name} is {config[name]}, tokenizer.json has {actual}"
    start, end = (tokenizer.token_to_id(str(config.get(name))) for name in ("bos_token", "eos_token"))
    for row in input_ids:
        marked = [list(row).index(token) for token in (start, end) if token is not None and token in row]
        if marked != sorted(marked):
            yield "tokenizer_config.json: eos_token comes before bos_token"
            return


def _pair(merge: str | tuple[str, str]) -> tuple[str, str]:
    left, _, right = merge.partition(" ") if isinstance(merge, str) else (merge[0], " ", merge[1])
    return left, right


def _read(kind: type[T], path: Path) -> T:
    """The JSON in a file as a value of `kind`. Raises InputError."""
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise InputError(f"{path}: {_first_fault(error)}", REMEDY) from error


@dataclass(frozen=True)
class ListedClasses:
    """classes/TASK.json: class names in row order, and prompt templates."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    task: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    learned: bool

    @property
    def prompts(self) -> list[str]:
        """All templates of the first class, then of the next."""
        return [template.replace("{}", name) for name in self.classes for template in self.templates]

    @classmethod
    def read(cls, path: Path) -> ListedClasses:
        """Raises InputError."""
        return _read(cls, path)


def client_embed(release: Path) -> Callable[[list[str]], np.ndarray]:
    """Prompts -> unit-norm embeddings (n, D) with the release's tokenizer and text tower, as a client computes them."""
    tokenize, run = ClientTokenizer(release), runner(open_session(release / "textual.onnx"))

    def embed(prompts: list[str]) -> np.ndarray:
        parts = [tokenize(prompts[i : i + BATCH]) for i in range(0, len(prompts), BATCH)]
        return np.concatenate([run({"input_ids": part}) for part in parts])

    return embed
