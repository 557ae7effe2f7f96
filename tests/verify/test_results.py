"""A result cannot claim what was not looked at, however it is made."""

from dataclasses import fields, replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from report.examples import latency, release, run, stage

from r1export.verify.results import (
    SKIPPED,
    TITLES,
    Check,
    Contents,
    Latency,
    Parity,
    Proof,
    Rung,
    Verdict,
    overall,
)

CHECKS = (Check, Parity, Rung, Latency)
VERDICTS = st.sampled_from(list(Verdict))
COUNTS = st.integers(0, 5)
DIGEST = "a" * 64
PASSES = {
    Check: Check.judge([], looked_at=2, of=2, detail="well"),
    Parity: stage(1e-6, 1e-6),
    Rung: Rung.judge([], looked_at=2, of=2, detail="well", digest=DIGEST, expected=DIGEST),
    Latency: latency(),
}


@given(kind=st.sampled_from(CHECKS), looked_at=COUNTS, of=COUNTS)
def test_a_pass_that_did_not_look_at_everything_cannot_be_made(kind: type[Check], looked_at: int, of: int) -> None:
    assume(not 0 < looked_at == of)
    with pytest.raises(ValueError, match="a pass that looked at"):
        replace(PASSES[kind], looked_at=looked_at, of=of)
    with pytest.raises(ValueError, match="a pass that looked at"):
        kind(verdict=Verdict.PASS, looked_at=looked_at, of=of)


@pytest.mark.parametrize("kind", [Parity, Rung, Latency])
def test_a_pass_without_the_figures_that_decide_it_cannot_be_made(kind: type[Check]) -> None:
    with pytest.raises(ValueError, match="without the figures"):
        kind(verdict=Verdict.PASS, looked_at=1, of=1)


@pytest.mark.parametrize(
    ("check", "changes"),
    [
        (PASSES[Parity], {"max_abs": None}),
        (PASSES[Parity], {"max_abs": float("nan")}),
        (PASSES[Parity], {"max_abs": 1e-4}),
        (PASSES[Parity], {"tolerance": float("inf")}),
        (PASSES[Parity], {"min_cosine": 0.9}),
        (PASSES[Parity], {"min_cosine_required": None}),
        (PASSES[Rung], {"digest": ""}),
        (PASSES[Rung], {"expected": "b" * 64}),
        (PASSES[Latency], {"ratio": None}),
        (PASSES[Latency], {"noise_floor": None}),
        (PASSES[Latency], {"ci95": (0.9, 1.001)}),
        (PASSES[Latency], {"margin": 0.001}),
    ],
)
def test_a_pass_that_its_own_figures_contradict_cannot_be_made(check: Check, changes: dict) -> None:
    assert check.verdict == "pass"
    with pytest.raises(ValueError, match="without the figures"):
        replace(check, **changes)


@given(problems=st.lists(st.text(max_size=5), max_size=8), looked_at=COUNTS, of=COUNTS)
def test_a_judgement_passes_only_without_problems_and_with_everything_looked_at(
    problems: list, looked_at: int, of: int
) -> None:
    check = Check.judge(problems, looked_at=looked_at, of=of, detail="well")
    assert (check.verdict == "pass") == (not problems and 0 < looked_at == of)
    assert (check.verdict == "fail") == bool(problems)


@pytest.mark.parametrize("fields", [{"looked_at": 0, "of": 0}, {"looked_at": 1, "of": 1, "detail": "a reason"}])
def test_a_check_that_does_not_apply_has_a_reason_and_no_items(fields: dict) -> None:
    with pytest.raises(ValueError, match="does not apply"):
        Check(verdict=Verdict.NOT_APPLICABLE, **fields)
    assert Check.not_applicable("the base has no merge").detail == "the base has no merge"


def test_many_problems_are_cut_and_counted() -> None:
    check = Check.judge([f"p{i}" for i in range(7)], looked_at=7, of=7, detail="well")
    assert check.detail == "p0; p1; p2; p3; p4 (and 2 more)"


def test_a_share_is_said_with_its_count() -> None:
    check = Check.judge([], looked_at=3, of=1000, detail="well")
    assert (check.verdict, check.detail) == ("inconclusive", "looked at 3 of 1000; a pass needs all")


@given(st.lists(VERDICTS), st.randoms())
def test_the_order_of_verdicts_does_not_matter(verdicts: list, random) -> None:
    assert overall(random.sample(verdicts, len(verdicts))) == overall(verdicts)


@given(st.lists(VERDICTS, min_size=1), VERDICTS)
def test_one_more_verdict_never_makes_a_pass_of_what_was_none(verdicts: list, more: Verdict) -> None:
    before = overall(verdicts)
    applicable = set(verdicts) - {Verdict.NOT_APPLICABLE}
    if applicable and before != "pass":
        assert overall([*verdicts, more]) != "pass"


def test_nothing_applicable_is_inconclusive() -> None:
    assert overall([]) == overall([Verdict.NOT_APPLICABLE]) == "inconclusive"


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=4))
def test_joined_checks_pass_only_if_all_of_them_do(parts: list) -> None:
    checks = [Check.judge(["wrong"] if wrong else [], looked_at=n, of=3, detail="well") for wrong, n in parts]
    joined = Check.joined(checks)
    assert (joined.verdict == "pass") == all(check.verdict == "pass" for check in checks)
    assert (joined.looked_at, joined.of) == (sum(c.looked_at for c in checks), sum(c.of for c in checks))


def replaced(key: str, check: Check):
    """The example with one check exchanged."""
    report = release()
    if key == "latency":
        return replace(report, latency=check)
    group, name = key.split(".")
    return replace(report, **{group: replace(getattr(report, group), **{name: check})})


KEYS = [key for key, _ in release().checks()]


@pytest.mark.parametrize("verdict", ["failed", "unmeasured"])
@pytest.mark.parametrize("key", KEYS)
def test_every_check_of_a_release_decides_its_verdict_and_is_its_reason(key: str, verdict: str) -> None:
    kind = type(dict(release().checks())[key])
    report = replaced(key, getattr(kind, verdict)("because"))
    assert report.verdict == ("fail" if verdict == "failed" else "inconclusive")
    assert report.reasons == (f"{TITLES[key]}: {'failed' if verdict == 'failed' else 'inconclusive'}. because",)
    assert run(release(), report).verdict == report.verdict
    assert run(release(), report).reasons == (f"03-flowers-17: {report.reasons[0]}",)


@pytest.mark.parametrize("key", KEYS)
def test_what_does_not_apply_does_not_affect_the_verdict(key: str) -> None:
    kind = type(dict(release().checks())[key])
    assert replaced(key, kind.not_applicable("nothing there")).verdict == "pass"


def test_every_check_has_a_title_and_no_title_is_without_a_check() -> None:
    assert set(TITLES) == {*KEYS, *(key for key, _ in run().checks())}


def test_what_was_skipped_after_a_failure_is_no_reason_of_its_own() -> None:
    contents = Contents.only(SKIPPED, manifest=Check.failed("edited"))
    report = release(contents=contents, proof=Proof.unmeasured(SKIPPED), latency=Latency.unmeasured(SKIPPED))
    assert report.reasons == ("Manifest: failed. edited",)
    assert {check.verdict for check in (contents.files, contents.golden)} == {"inconclusive"}


@pytest.mark.parametrize("name", [field.name for field in fields(type(run().contents))])
def test_a_run_that_is_not_whole_is_no_pass(name: str) -> None:
    report = run(contents=replace(run().contents, **{name: Check.unmeasured("1 of 3 tasks")}))
    assert report.verdict == "inconclusive"
    assert report.reasons == (f"{TITLES[f'run.{name}']}: inconclusive. 1 of 3 tasks",)
