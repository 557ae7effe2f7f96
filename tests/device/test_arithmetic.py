"""The known answers are those of exact arithmetic, and an arithmetic that is another one is noticed."""

from fractions import Fraction

import numpy as np
import pytest

from r1export.device import arithmetic, worker
from r1export.device.arithmetic import KNOWN_ANSWERS, known_answers_hold
from r1export.errors import Unsupported
from r1export.update import factors


def nearest(value: Fraction, digits: int, smallest: int) -> Fraction:
    """`value` rounded to a significand of `digits` bits and multiples of 2**smallest, ties to even, by integers alone."""
    if value == 0:
        return value
    exponent = len(bin(abs(value.numerator))) - len(bin(value.denominator))
    exponent -= abs(value) < Fraction(2) ** exponent
    unit = Fraction(2) ** max(exponent - digits + 1, smallest)
    return round(value / unit) * unit  # round of a Fraction goes to even


def merge(weight: float, products: list[tuple[float, float]], dtype: str, significands: tuple[int, ...]) -> Fraction:
    """`r1-f64-v1` by exact arithmetic; each sum is rounded to each of `significands` in turn: (53,) is float64."""
    total = Fraction(weight)
    for u, v in products:
        total += Fraction(u) * Fraction(v)
        for digits in significands:
            total = nearest(total, digits, -16445 if digits == 64 else -1074)
    total = nearest(total, 24, -149)
    return nearest(total, 11, -24) if dtype == "f2" else total


@pytest.mark.parametrize("case", KNOWN_ANSWERS)
def test_the_known_answers_are_those_of_exact_arithmetic(case):
    dtype, weight, products, expected = case
    assert merge(weight, products, dtype, (53,)) == Fraction(expected)


def test_double_rounding_would_change_an_answer():
    dtype, weight, products, expected = KNOWN_ANSWERS[-1]
    assert Fraction(expected) == Fraction(1, 2**52)
    assert merge(weight, products, dtype, (64, 53)) == 0


@pytest.mark.skipif(np.finfo(np.longdouble).nmant != 63, reason="no 80-bit long double here")
def test_a_unit_that_adds_in_extended_precision_is_noticed(monkeypatch):
    def merge_in_extended_precision(block, u, v):
        acc = block.astype(np.float64)
        for u_e, v_e in zip(u.T.astype(np.longdouble), v.astype(np.longdouble), strict=True):
            acc = (acc + u_e[:, None] * v_e[None, :]).astype(np.float64)
        block[...] = acc.astype(np.float32)

    monkeypatch.setattr(factors, "_merge_", merge_in_extended_precision)
    with pytest.raises(Unsupported, match=f"arithmetic self-test {len(KNOWN_ANSWERS)}: .*0.0"):
        known_answers_hold()


def test_a_fresh_process_gives_the_known_answers():
    worker.known_answers_hold_in_fresh_process()


def test_what_a_fresh_process_finds_is_raised_here(monkeypatch):
    monkeypatch.setattr(
        worker,
        "_START",
        worker._START.replace(
            "main(*",
            "import r1export.device.arithmetic as a; a.KNOWN_ANSWERS[0] = ('f4', 1.0, [(0.0, 0.0)], 2.0); main(*",
        ),
    )
    with pytest.raises(Unsupported, match="arithmetic self-test 1"):
        worker.known_answers_hold_in_fresh_process()
    monkeypatch.setattr(worker, "_START", "import sys; sys.exit(9)")
    with pytest.raises(Unsupported, match="arithmetic of this machine: the process did not start: exit code 9"):
        worker.known_answers_hold_in_fresh_process()
    assert arithmetic.KNOWN_ANSWERS is KNOWN_ANSWERS
