"""Does this machine's arithmetic match the build host's? Known answers for every step where processors or settings could differ.

The cases are: a tie, one unit beyond it, subnormal results (flushed to zero if another library changed the processor's
mode), the two roundings of float16, experts whose order changes the result, and a sum that an x87 unit would round twice.
"""

from __future__ import annotations

import math

import numpy as np

from r1export.errors import Unsupported
from r1export.update.factors import ExpertUpdate, Factors, Rows

TINY = 2.0**-149  # the smallest float32
# (weight's type, weight, products to add in order as (u, v), result)
KNOWN_ANSWERS: list[tuple[str, float, list[tuple[float, float]], float]] = [
    ("f4", 1.0, [(2.0**-12, 2.0**-12)], 1.0),  # half a unit: rounds to even, down
    ("f4", 1 + 2.0**-23, [(2.0**-12, 2.0**-12)], 1 + 2.0**-22),  # half a unit: rounds to even, up
    ("f4", 1.0, [(2.0**-12 * (1 + 2.0**-23), 2.0**-12)], 1 + 2.0**-23),  # just above half a unit
    ("f4", 3 * TINY, [(2.0**-75, 2.0**-75)], 4 * TINY),  # a tie between subnormals
    ("f4", TINY, [(0.0, 0.0)], TINY),  # a subnormal is kept
    ("f4", 2.0**-126, [(-(2.0**-74), 2.0**-74)], 2.0**-126 - 2 * TINY),  # a normal number becomes subnormal
    ("f4", 1.0, [(2.0**27, 2.0**26), (1.0, 1.0), (-(2.0**27), 2.0**26)], 0.0),  # in this order both ones are lost
    ("f4", 1.0, [(1.0, 1.0), (2.0**27, 2.0**26), (-(2.0**27), 2.0**26)], 2.0),  # in this order none
    (
        "f4",
        -1.25 * 2.0**-54,
        [(1 + 2.0**-23, 1.0), (2.0**-12 * (1 + 2.0**-15), 2.0**-12 * (1 - 2.0**-15))],
        1 + 2.0**-22,
    ),
    (
        "f4",
        -1.25 * 2.0**-54,
        [(2.0**-12 * (1 + 2.0**-15), 2.0**-12 * (1 - 2.0**-15)), (1 + 2.0**-23, 1.0)],
        1 + 2.0**-23,
    ),  # the same, swapped
    ("f2", 1.0, [(2.0**-11, 1 + 2.0**-19)], 1.0),  # float32 first: a single rounding would give 1 + 2^-10
    ("f2", 2.0**-24, [(0.0, 0.0)], 2.0**-24),  # a subnormal float16 is kept
    # The product is 2^-53 + 2^-78, just above half a unit: float64 rounds up. With a 64-bit significand 2^-78 is lost first,
    # and what is left is a tie, which goes down.
    ("f4", 1.0, [(33 * 2.0**-39, 1016801 * 2.0**-39), (-1.0, 1.0)], 2.0**-52),
]


def known_answers_hold() -> None:
    """Merge each known case. Raises Unsupported if a result differs in a single bit.

    `worker.known_answers_hold_in_fresh_process` does the same where no other library can have changed the processor's mode.
    """
    for number, (dtype, weight, products, expected) in enumerate(KNOWN_ANSWERS, 1):
        base = _filled(weight, dtype)
        u = np.array([[u for u, _ in products]], "f4")
        v = np.array([[v] * 9 for _, v in products], "f4")
        merged = ExpertUpdate({Rows("w", 0, 1): Factors(u, v)}).apply({"w": base})["w"]
        if merged.tobytes() != _filled(expected, dtype).tobytes():
            raise Unsupported(
                f"arithmetic self-test {number}: {merged[0, 0]!r}, expected {expected!r}",
                "run the updater in a fresh process and check the processor's floating-point mode",
            )


def _filled(value: float, dtype: str) -> np.ndarray:
    """(1, 9) of `value`, which `dtype` can hold, put together from bits: a conversion would flush a subnormal just as the merge does.

    Nine columns: vector instructions and the scalar remainder.
    """
    digits, bias, words = {"f4": (23, 127, "u4"), "f2": (10, 15, "u2")}[dtype]
    fraction, exponent = math.frexp(abs(value))
    normal, steps = exponent + bias - 1, math.ldexp(abs(value), digits + bias - 1)
    bits = int(steps) if value == 0 or normal < 1 else normal << digits | int(math.ldexp(2 * fraction - 1, digits))
    return np.full((1, 9), bits | (value < 0) << (8 * np.dtype(words).itemsize - 1), words).view(dtype)
