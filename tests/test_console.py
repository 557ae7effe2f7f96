"""What the terminal says of a report."""

from dataclasses import replace

import pytest
from report.examples import accuracy, release

from r1export.console import Terminal
from r1export.verify.results import Latency, ParityStages, Proof, Report, Rung

PROOF = release().proof


def printed(capsys, report: Report) -> str:
    Terminal(as_json=False).report(report)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("proof", "shown"),
    [
        (PROOF, "pass"),
        (replace(PROOF, cost=Rung.failed("heavier")), "fail"),
        (replace(PROOF, cost=Rung.unmeasured("busy")), "-"),
        (Proof.not_applicable("no base"), "n/a"),
    ],
)
def test_the_graph_passes_only_if_every_rung_was_climbed(capsys, proof: Proof, shown: str) -> None:
    row = next(line for line in printed(capsys, release(proof=proof)).splitlines() if line.startswith("03-flowers-17"))
    assert row.split()[4] == shown


def test_what_does_not_apply_is_told_from_what_was_not_measured(capsys) -> None:
    report = release(parity=ParityStages.unmeasured("no time"), latency=Latency.not_applicable("nothing to compare"))
    shown = printed(capsys, report)
    row = next(line for line in shown.splitlines() if line.startswith("03-flowers-17"))
    assert row.split()[1:6] == ["-", "-", "-", "pass", "n/a"]
    assert "Not applicable: L5 Time (nothing to compare)" in shown


def test_control_sequences_in_a_name_never_reach_the_terminal(capsys) -> None:
    facts = replace(release().release, name="a\x1b]0;owned\x07b\u202e")
    assert "\x1b" not in printed(capsys, release(release=facts))
    terminal = Terminal(as_json=False)
    terminal.step("a\x1b[2J")
    terminal.say("a\x1b[2J")
    terminal.accuracy(accuracy(tasks=("a\x1b[2J", "b", "c")))
    terminal.table("t", ["a"], [["x\x1b[2J"]])
    shown = capsys.readouterr()
    assert "\x1b[2J" not in shown.out + shown.err
