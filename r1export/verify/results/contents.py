"""The results for the contents of a release."""

from __future__ import annotations

from dataclasses import dataclass, fields

from r1export.verify.results.check import Check, Verdict, named_checks, overall

UNSIGNED = Check.not_applicable("no signed update to compare with (--bundle)")


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The checks of the contents of a release folder."""

    manifest: Check
    files: Check
    base: Check
    graphs: Check
    tensors: Check
    weights: Check
    preprocess: Check
    tokenizer: Check
    classes: Check
    classifier: Check
    golden: Check
    accuracy: Check
    card: Check
    signature: Check

    @classmethod
    def only(cls, reason: str, **measured: Check) -> Contents:
        """The `measured` checks; all others are unmeasured because of `reason`."""
        return cls(**{f.name: Check.unmeasured(reason) for f in fields(cls)} | {"signature": UNSIGNED} | measured)

    @property
    def verdict(self) -> Verdict:
        return overall(check.verdict for _, check in named_checks(self))


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What golden samples can detect: the smallest relative change of all values of `parameter` that fails the check.

    None: not even `largest_tried` fails it.
    """

    parameter: str
    relative_change: float | None
    largest_tried: float
