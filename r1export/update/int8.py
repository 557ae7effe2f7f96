"""Weights as 8-bit integers with a scale per row: W ~ scale[:, None] * q, with the same bits on the build host and on every device.

    scale = float32(max |w| / 127)      q = round half to even (w / scale), in float64      W = float32(scale * q)

A rank-1 update can't be added to integers. Each version is therefore the dequantized W of the base, merged by
`ExpertUpdate.apply` and quantized again once, so rounding errors don't accumulate over versions.
"""

from __future__ import annotations

import numpy as np

from r1export.errors import InputError

PROCEDURE_INT8 = "r1-f64-v1+q8"  # the merge, then this rounding
LEVELS = 127  # symmetric: -128 is not used


def quantize(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """q (rows, in) in int8 and scale (rows,) in float32 of a finite weight (rows, in) in float32.

    A row of zeros, or one whose scale would be subnormal, gets scale 1 and becomes zero.
    """
    rows = weight.astype(np.float64).reshape(len(weight), -1)
    scale = (np.abs(rows).max(axis=1, initial=0.0) / LEVELS).astype(np.float32)
    scale = np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)
    q = np.clip(np.rint(rows / scale.astype(np.float64)[:, None]), -LEVELS, LEVELS)
    return q.astype(np.int8).reshape(weight.shape), scale


def dequantize(q: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """W (rows, in) in float32: the product of float32 and int8 is exact in float64, so this is ONNX's DequantizeLinear.

    Raises InputError if the types or shapes do not fit.
    """
    if q.dtype != np.int8 or scale.dtype != np.float32 or scale.shape != q.shape[:1] or not np.isfinite(scale).all():
        raise InputError(
            f"quantized weight {q.dtype}{list(q.shape)} with scale {scale.dtype}{list(scale.shape)}",
            "expected int8 (rows, in) and float32 (rows)",
        )
    exact = q.astype(np.float64) * scale.astype(np.float64).reshape(-1, *[1] * (q.ndim - 1))
    return exact.astype(np.float32)
