"""The results of the proof of zero added latency: rungs L0 to L4."""

from __future__ import annotations

from dataclasses import dataclass

from r1export.verify.results.check import Check, Verdict, overall

RUNGS = ("same_file", "graph", "optimized_graph", "executed_ops", "cost")


@dataclass(frozen=True, kw_only=True)
class Rung(Check):
    """One rung of the proof: the digests of the release and of the base, which must be equal. Counts are graphs."""

    digest: str = ""
    expected: str = ""

    def _decided(self) -> bool:
        return bool(self.digest) and self.digest == self.expected


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The rungs L0 to L4, and the control: the rungs must detect the unmerged model. Its counts are towers."""

    same_file: Rung
    graph: Rung
    optimized_graph: Rung
    executed_ops: Rung
    cost: Rung
    control: Check

    @classmethod
    def unmeasured(cls, reason: str) -> Proof:
        return cls(**dict.fromkeys(RUNGS, Rung.unmeasured(reason)), control=Check.unmeasured(reason))

    @classmethod
    def not_applicable(cls, reason: str) -> Proof:
        return cls(**dict.fromkeys(RUNGS, Rung.not_applicable(reason)), control=Check.not_applicable(reason))

    @property
    def verdict(self) -> Verdict:
        """The verdict of the rungs, without the control."""
        return overall(getattr(self, name).verdict for name in RUNGS)
