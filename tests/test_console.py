"""What the terminal says of a report."""

import pytest

from r1export.console import Terminal
from r1export.report.checks import LADDER

RUNGS = {name: {"verdict": "pass"} for name in LADDER}


def program(capsys, **release) -> str:
    """The column "program" of the table of releases."""
    report = {
        "release": {"name": "01-digits"},
        "verdict": "fail",
        "contents": {"files": {"verdict": "pass"}},
        **release,
    }
    Terminal(as_json=False).report(report)
    return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("01-digits")).split()[4]


@pytest.mark.parametrize(
    ("proof", "shown"),
    [
        (RUNGS, "pass"),
        (RUNGS | {"cost": {"verdict": "fail"}}, "fail"),
        (RUNGS | {"cost": {"verdict": "not measured"}}, "-"),
        ({"graph": {"verdict": "fail"}}, "fail"),
        ({"same_file": {"verdict": "pass"}}, "-"),
        ({}, "-"),
    ],
)
def test_the_program_passes_only_if_every_rung_of_the_ladder_was_climbed(capsys, proof, shown) -> None:
    assert program(capsys, proof=proof) == shown
