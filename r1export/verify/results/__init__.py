"""The results of a verification as frozen types, one file per kind of result.

Parity, latency and the rungs of the proof are checks that also need the figures that decide them.
"""

from r1export.verify.results.accuracy import Accuracy, Agreement, Drift, Gaps, Guard, Probe, RunGaps
from r1export.verify.results.check import LISTED, SKIPPED, Check, Verdict, combined, named_checks, overall
from r1export.verify.results.contents import UNSIGNED, Contents, Sensitivity
from r1export.verify.results.latency import UNTIMED, ClockRatios, Latency, ProviderLatency, Ratio, Times
from r1export.verify.results.parity import PARITY_STAGES, Difference, Flip, Histogram, Parity, ParityStages
from r1export.verify.results.proof import RUNGS, Proof, Rung
from r1export.verify.results.report import (
    TITLES,
    Answer,
    Environment,
    Example,
    ReleaseFacts,
    ReleaseReport,
    Report,
    RunContents,
    RunReport,
    TaskInputs,
    VariantCost,
)

__all__ = [
    "LISTED",
    "PARITY_STAGES",
    "RUNGS",
    "SKIPPED",
    "TITLES",
    "UNSIGNED",
    "UNTIMED",
    "Accuracy",
    "Agreement",
    "Answer",
    "Check",
    "ClockRatios",
    "Contents",
    "Difference",
    "Drift",
    "Environment",
    "Example",
    "Flip",
    "Gaps",
    "Guard",
    "Histogram",
    "Latency",
    "Parity",
    "ParityStages",
    "Probe",
    "Proof",
    "ProviderLatency",
    "Ratio",
    "ReleaseFacts",
    "ReleaseReport",
    "Report",
    "RunContents",
    "RunGaps",
    "RunReport",
    "Rung",
    "Sensitivity",
    "TaskInputs",
    "Times",
    "VariantCost",
    "Verdict",
    "combined",
    "named_checks",
    "overall",
]
