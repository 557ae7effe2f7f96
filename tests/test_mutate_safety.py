"""The list of safety rules is up to date, so that scripts/mutate_safety.py can take each of them out."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from mutate_safety import ROOT, RULES, VERIFY_RULES


@pytest.mark.parametrize("file", sorted({file for file, _, _ in (*VERIFY_RULES, *RULES)}))
def test_every_safety_rule_stands_once_in_its_file(file: str) -> None:
    text = (ROOT / "r1export" / file).read_text(encoding="utf-8")
    stale = [old for name, old, _ in (*VERIFY_RULES, *RULES) if name == file and text.count(old) != 1]
    assert stale == []
