"""Health check of the client files: golden images through preprocess.onnx, golden prompts through the tokenizer."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Callable

import numpy as np

from r1export.device.version import Version
from r1export.errors import CheckFailed, R1ExportError, first_line
from r1export.update.container import parse_tensors
from r1export.update.golden_samples import BYTES, MEAN_BYTES, GoldenSamples
from r1export.update.release_layout import GOLDEN, PREPROCESS, PREPROCESS_GRAPH, TOKENIZER, TOWERS, VISUAL
from r1export.update.strict_json import number, parse_json, wrong

TOKENIZER_FILE = f"{TOKENIZER}/tokenizer.json"
MAX_CONFIG = 1 << 20  # bytes of preprocess.json
REMEDY = "check the runtime, the processor and the release itself"
UNCHECKED = "not checked: the package tokenizers is not installed"
RunGraph = Callable[[str, str, np.ndarray], np.ndarray]  # (graph, output, value of its first input) -> the output


def check_client_files(version: Version, run: RunGraph) -> None:
    """Check that golden images become pixel_values and golden prompts input_ids, as far as this device can run it.

    Releases of older versions of r1export have neither images nor prompts. Raises CheckFailed for a difference or an
    unusable file, InputError for a malformed one.
    """
    samples = _samples(version)
    if samples is None:
        return
    if samples.pictures and PREPROCESS_GRAPH in version.paths:
        _check_pictures(version, samples, run)
    if has_tokenizers() and samples.prompts and TOKENIZER_FILE in version.paths:
        _check_prompts(version, samples)


def unchecked_tokenizer(version: Version) -> str:
    """Why `check_client_files` skips the tokenizer on this device; empty if it doesn't, or if there is none."""
    samples = None if has_tokenizers() else _samples(version)
    return UNCHECKED if samples and samples.prompts and TOKENIZER_FILE in version.paths else ""


def has_tokenizers() -> bool:
    """Whether the package tokenizers is installed, without importing it."""
    return importlib.util.find_spec("tokenizers") is not None


def _samples(version: Version) -> GoldenSamples | None:
    """The golden samples, if they cover both towers."""
    tensors = parse_tensors(version.read(GOLDEN), Path(GOLDEN)) if GOLDEN in version.paths else {}
    whole = all(name in tensors for tower in TOWERS for name in (tower.input, tower.output))
    return GoldenSamples.from_tensors(tensors) if whole else None


def _check_pictures(version: Version, samples: GoldenSamples, run: RunGraph) -> None:
    """Every image gives its row of pixel_values, up to rounding."""
    byte = _byte(version)
    if len(samples.pictures) > len(samples.pixel_values):
        raise CheckFailed(f"{GOLDEN} has more images than {VISUAL.input}", "export the release again")
    for index, picture in enumerate(samples.pictures):
        found, expected = run(PREPROCESS_GRAPH, VISUAL.input, picture), samples.pixel_values[index : index + 1]
        if found.shape != expected.shape:
            raise CheckFailed(f"{PREPROCESS_GRAPH}: pixel_values {found.shape}, expected {expected.shape}", REMEDY)
        steps = np.abs(found - expected) / byte
        if not (steps.max() <= BYTES and steps.mean() <= MEAN_BYTES):  # NaN is not
            raise CheckFailed(
                f"health check of {PREPROCESS_GRAPH}: image {index} differs by up to {steps.max():.3g} of 255 levels, "
                f"{steps.mean():.3g} on average; limits {BYTES:g} and {MEAN_BYTES:g}",
                REMEDY,
            )


def _byte(version: Version) -> float:
    """The largest change of pixel_values when a pixel changes by one of 255 levels."""
    fields = parse_json(version.read(PREPROCESS), PREPROCESS, MAX_CONFIG)
    scale = fields.number("scale", 1e-6, 1)
    stds = [number(value, location, 1e-6, 1e6) for value, location in fields.array("std", 3)]
    if len(stds) != 3:
        raise wrong(f"{PREPROCESS}.std", stds, "three numbers")
    return scale / min(stds)


def _check_prompts(version: Version, samples: GoldenSamples) -> None:
    """Every prompt gives exactly its row of input_ids."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(version.read(TOKENIZER_FILE))
        rows = [encoding.ids for encoding in tokenizer.encode_batch(list(samples.prompts))]
    except (R1ExportError, OSError):
        raise
    except Exception as error:  # the library raises plain Exceptions
        raise CheckFailed(f"cannot load {TOKENIZER_FILE}: {first_line(error)}", REMEDY) from error
    pairs = zip(rows, samples.input_ids.tolist())
    other = [index for index, (row, expected) in enumerate(pairs) if row != expected]
    if other or len(rows) != len(samples.input_ids):
        first = samples.prompts[other[0]] if other else f"{len(rows)} of {len(samples.input_ids)} prompts"
        raise CheckFailed(f"health check of {TOKENIZER_FILE}: wrong input_ids, first for {first[:60]!r}", REMEDY)
