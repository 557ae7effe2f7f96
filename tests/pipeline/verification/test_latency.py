"""Rung L5 of several releases of a run, timed together."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from running import QUICK, context_of

from r1export.pipeline.variant import ReleaseRef, Variant
from r1export.pipeline.verification.inputs import parity_inputs
from r1export.pipeline.verification.latency import TOGETHER, PendingTiming, group_size, release_latencies
from r1export.pipeline.verification.run import verify_run


@pytest.fixture
def run(verified: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(verified, tmp_path / "run"))


@pytest.fixture
def releases(run: Path) -> list[ReleaseRef]:
    context = context_of(run)
    updates = context.run.updates(context.recipe)
    return [Variant(context, "fp32").release(number, updates) for number in range(3)]


def test_each_release_has_the_latency_of_its_own_and_one_that_failed_has_none(run: Path) -> None:
    (run / "releases" / "01-digits" / "visual.onnx").write_bytes(b"no graph")
    base, broken, sound = verify_run(context_of(run), budget=QUICK).releases
    assert (base.latency.verdict, broken.latency.verdict, broken.latency.looked_at) == (
        "not_applicable",
        "inconclusive",
        0,
    )
    assert sound.release.name == "02-arrows"
    assert sound.latency.pairs > 0
    assert "merged_torch" in sound.latency.providers["CPUExecutionProvider"]["1"]


def test_only_a_release_whose_unmerged_model_runs_is_compared_with_it(releases: list[ReleaseRef]) -> None:
    def pending(ref: ReleaseRef, control: bool) -> PendingTiming:
        return PendingTiming(ref, "visual", parity_inputs(ref.context, ref.task).visual[:1], control, {})

    without, with_control = release_latencies(
        [pending(releases[2], False), pending(releases[1], True)], ("cpu",), QUICK
    )
    assert without.unmerged_ratio is None
    assert with_control.unmerged_ratio is not None
    assert without.noise_floor == with_control.noise_floor, "both are compared with the same base"


@pytest.mark.parametrize(("megabytes", "expected"), [(10, TOGETHER), (150, 7), (345, 2), (2000, 1)])
def test_fewer_releases_of_a_large_model_are_timed_together(
    releases: list[ReleaseRef], megabytes: int, expected: int
) -> None:
    os.truncate(releases[0].path / "visual.safetensors", megabytes * 10**6)
    assert group_size(releases[0]) == expected
