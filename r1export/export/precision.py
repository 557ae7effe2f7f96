"""The precisions a release can have. Each has its graphs, written once, and its own form of the same parameters.

    fp32   as trained                      fp16   half the bytes                      int8   a quarter of the bytes

A version in any precision is its own base plus the same updates: the base is rounded first, the experts are merged into
what was rounded, and the result is rounded once more. So a device derives from the base it holds the bytes that are
written here, and rounding errors never add up over versions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from r1export.errors import Unsupported
from r1export.export.fp16 import half_graphs
from r1export.export.int8 import SCALE, STEP, ZERO, Ranges, input_scale, quantized_graphs, range_of
from r1export.export.weight_map import WeightMap
from r1export.update.factors import ExpertUpdate
from r1export.update.int8 import dequantize, quantize

WRITERS = {"fp16": half_graphs, "int8": quantized_graphs}  # (graphs in fp32, new folder) -> WeightMap


def version_tensors(
    base: Mapping[str, np.ndarray], updates: Sequence[ExpertUpdate], weights: WeightMap, ranges: Ranges
) -> dict[str, np.ndarray]:
    """All that the weights files of a version hold, by name: `base` (float32) with `updates`, in the types of `weights`.

    `ranges` are those of the inputs of int8 weights, of the base. The same bits everywhere: numpy, float64, half to even.

    Raises Unsupported: a weight is too large for its type.
    """
    rounded = rounded_base(base, weights)
    return stored_tensors(rounded | ExpertUpdate.stack(updates).apply(rounded), weights, ranges)


def rounded_base(base: Mapping[str, np.ndarray], weights: WeightMap) -> dict[str, np.ndarray]:
    """The parameters that updates are merged into: what a device reads from the base's files."""
    rounded = dict(base)
    for name, (_, placement) in weights.placements().items():
        if placement.dtype == "I8":
            rounded[name] = dequantize(*quantize(base[name]))
        elif placement.dtype == "F16":
            rounded[name] = _half(name, base[name])
    return rounded


def stored_tensors(parameters: Mapping[str, np.ndarray], weights: WeightMap, ranges: Ranges) -> dict[str, np.ndarray]:
    """Merged parameters as the files hold them: int8 weights as integers, with the scales of their rows and of quantised values."""
    tensors: dict[str, np.ndarray] = {}
    for name, (_, placement) in weights.placements().items():
        if placement.dtype == "I8":
            tensors[name], tensors[name + SCALE] = quantize(parameters[name])
        elif name.endswith(ZERO):
            value = name.removesuffix(ZERO)
            tensors[value + STEP], tensors[name] = input_scale(*ranges[range_of(value)])
        elif name in parameters:
            tensors[name] = parameters[name]
    return tensors


def _half(name: str, value: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):  # overflow is refused below, underflow is what fp16 means
        half = value.astype(np.float16)
    if not np.isfinite(half).all():
        raise Unsupported(f"{name} has values beyond float16 (65504)", "use the fp32 variant")
    return half
