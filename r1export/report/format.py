"""Formatting of numbers for people."""

from __future__ import annotations

from r1export.verify.results import UNTIMED, Check, Verdict

NOT_MEASURED = "not measured"
NOT_APPLICABLE = "not applicable"
MINUS = "\N{MINUS SIGN}"


def or_not_applicable(check: Check, figure: str) -> str:
    """The figure of a check, or that the check does not apply. With --no-latency the latency is merely not measured."""
    applies = check.verdict is not Verdict.NOT_APPLICABLE or check.detail == UNTIMED
    return figure if applies else NOT_APPLICABLE


def scientific(value: float | None) -> str:
    """3.1e-6: two significant digits, with a plain hyphen so that it can be copied into a recipe; exact zero is 0."""
    if value is None:
        return NOT_MEASURED
    if value == 0:
        return "0"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits}e{int(exponent)}"


def cosine(value: float | None) -> str:
    """A cosine near one as its distance from one: 0.9999999 is 1 minus 1.0e-7."""
    if value is None:
        return NOT_MEASURED
    if value >= 1:
        return "1"
    return f"1 {MINUS} {scientific(1 - value)}" if value > 0.999 else f"{value:.4f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction in percent; only exactly 1 is shown as 100."""
    if value is None:
        return NOT_MEASURED
    text = f"{100 * value:.{digits}f}"
    if float(text) == 0:
        text = text.removeprefix("-")
    if value < 1 and float(text) == 100:
        text = f"{100 - 10**-digits:.{digits}f}"
    return f"{text} %".replace("-", MINUS)


def points(value: float | None) -> str:
    """A difference of two fractions in percentage points."""
    return NOT_MEASURED if value is None else f"{percent(value).removesuffix(' %')} points"


def ratio(value: float | None) -> str:
    """A ratio of times with three decimals."""
    return NOT_MEASURED if value is None else f"{value:.3f}"


def interval(ends: tuple[float, float] | None) -> str:
    """An interval of ratios, `0.996 to 1.004`."""
    return f"{ends[0]:.3f} to {ends[1]:.3f}" if ends else NOT_MEASURED


def milliseconds(value: float | None) -> str:
    """Times with three significant digits or two decimals, whichever is shorter."""
    if value is None:
        return NOT_MEASURED
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def size(count: float | None) -> str:
    """Bytes with decimal prefixes: kB, MB, GB."""
    if count is None:
        return NOT_MEASURED
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def share(part: float | None, whole: float | None) -> str:
    """`part` of `whole` in percent with two significant digits."""
    if part is None or not whole:
        return NOT_MEASURED
    return f"{float(f'{100 * part / whole:.2g}'):g} %"
