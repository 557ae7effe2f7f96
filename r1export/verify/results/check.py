"""A check and its verdict. A `Check` can pass only if it looked at all of its items, and there is at least one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, Self

LISTED = 5  # problems that one check names; the rest are counted
SKIPPED = "not measured because an earlier check failed"


class Verdict(StrEnum):
    """The result of a check. NOT_APPLICABLE: there is nothing to check, which is neither a pass nor a reason against one."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    NOT_APPLICABLE = "not_applicable"


def overall(verdicts: Iterable[Verdict]) -> Verdict:
    """One verdict for many: fail beats inconclusive beats pass. Checks that don't apply are ignored; none left is inconclusive."""
    applicable = set(verdicts) - {Verdict.NOT_APPLICABLE}
    if Verdict.FAIL in applicable:
        return Verdict.FAIL
    return Verdict.PASS if applicable == {Verdict.PASS} else Verdict.INCONCLUSIVE


def combined(verdicts: Iterable[Verdict]) -> Verdict:
    """One verdict for checks that are shown together: as `overall`, but not applicable if none of them applies."""
    listed = set(verdicts)
    return Verdict.NOT_APPLICABLE if listed <= {Verdict.NOT_APPLICABLE} else overall(listed)


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of one check, which looked at `looked_at` of `of` items.

    Raises ValueError for a pass that did not look at every item or has none, and for a check that doesn't apply but has
    items or no reason.
    """

    verdict: Verdict
    looked_at: int
    of: int
    detail: str = ""

    def __post_init__(self) -> None:
        if self.looked_at < 0 or self.of < 0:
            raise ValueError(f"looked at {self.looked_at} of {self.of}")
        if self.verdict is Verdict.NOT_APPLICABLE and (self.of or self.looked_at or not self.detail):
            raise ValueError("a check that does not apply has a reason and nothing to look at")
        if self.verdict is Verdict.PASS and not 0 < self.looked_at == self.of:
            raise ValueError(f"a pass that looked at {self.looked_at} of {self.of}")
        if self.verdict is Verdict.PASS and not self._decided():
            raise ValueError("a pass without the figures that decide it")

    def _decided(self) -> bool:
        """Whether the figures of the check support a pass."""
        return True

    @classmethod
    def judge(cls, problems: Iterable[str], *, looked_at: int, of: int, detail: str, **figures: Any) -> Self:
        """A failure for any problem; inconclusive if items are missing or there are none; a pass otherwise.

        `detail` is the sentence for a pass. `figures` are the other fields of the type.
        """
        listed = list(problems)
        if listed:
            more = f" (and {len(listed) - LISTED} more)" if len(listed) > LISTED else ""
            verdict, detail = Verdict.FAIL, "; ".join(listed[:LISTED]) + more
        elif 0 < looked_at == of:
            verdict = Verdict.PASS
        else:
            verdict, detail = Verdict.INCONCLUSIVE, f"looked at {looked_at} of {of}; a pass needs all"
        return cls(verdict=verdict, looked_at=looked_at, of=of, detail=detail, **figures)

    @classmethod
    def failed(cls, reason: str, *, looked_at: int = 0, of: int = 0) -> Self:
        """A failure without figures: the measurement could not run."""
        return cls(verdict=Verdict.FAIL, looked_at=looked_at, of=of, detail=reason)

    @classmethod
    def joined(cls, checks: Iterable[Check]) -> Check:
        """One check for several related ones, of which there is at least one."""
        listed = list(checks)
        verdict = overall(check.verdict for check in listed)
        telling = [c.detail for c in listed if c.verdict is verdict or verdict is Verdict.PASS]
        looked_at, of = sum(c.looked_at for c in listed), sum(c.of for c in listed)
        return Check(verdict=verdict, looked_at=looked_at, of=of, detail="; ".join(telling))

    @classmethod
    def unmeasured(cls, reason: str, *, of: int = 0) -> Self:
        """Inconclusive: could not be measured, with the reason."""
        return cls(verdict=Verdict.INCONCLUSIVE, looked_at=0, of=of, detail=reason)

    @classmethod
    def not_applicable(cls, reason: str) -> Self:
        """The check doesn't apply, with the reason."""
        return cls(verdict=Verdict.NOT_APPLICABLE, looked_at=0, of=0, detail=reason)


def named_checks(group: Any) -> Iterator[tuple[str, Check]]:
    """The checks of a result type by the names of their fields."""
    for f in fields(group):
        yield f.name, getattr(group, f.name)
