"""A release is verified without torch, which takes seconds to import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

VERIFY = """
import sys
sys.modules |= {"torch": None, "open_clip": None}  # an import of either raises ImportError
from r1export.pipeline.verification.release import verify_release
report = verify_release(sys.argv[1], budget=None)
print(report.contents.verdict.value, report.parity.export.verdict.value, report.proof.executed_ops.verdict.value)
"""


def test_a_release_is_verified_where_torch_cannot_be_imported(verified: Path) -> None:
    command = [sys.executable, "-c", VERIFY, str(verified / "releases" / "01-digits")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["pass", "pass", "pass"], done.stderr
