"""Verify a release folder by itself: what it says of itself, its golden samples, and the base release next to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from r1export.errors import Unsupported
from r1export.pipeline.environment import environment, now
from r1export.pipeline.verification.contents import WEIGHTS, check_manifest_and_files
from r1export.pipeline.verification.latency import opener, timeable
from r1export.pipeline.verification.proof import graph_feeds, run_graphs
from r1export.recipe import Verify
from r1export.update.atomic_io import sha256_file
from r1export.update.container import map_tensors, read_tensors
from r1export.update.release_layout import GRAPHS, MANIFEST
from r1export.update.release_manifest import ReleaseManifest
from r1export.verify import contents, latency, parity, proof
from r1export.verify.contents import UNREADABLE, attempt
from r1export.verify.golden import check_classifier, check_golden, golden_parity
from r1export.verify.latency import DEFAULT_BUDGET, Contenders, TimingBudget
from r1export.verify.proof import Feeds
from r1export.verify.results import (
    SKIPPED,
    UNTIMED,
    Check,
    Contents,
    Latency,
    Parity,
    ParityStages,
    Proof,
    ReleaseFacts,
    ReleaseReport,
    Verdict,
    overall,
)  # fmt: skip
from r1export.verify.runtime import PROVIDERS, check_provider

NO_RUN = "a release alone does not know what it was trained from: verify its run"
NO_BASE = "there is no base release next to it (../00-base) that it could be compared with"
IS_BASE = "the base release is what the others are compared with"


def verify_release(
    path: Path, providers: Sequence[str] = (), budget: TimingBudget | None = DEFAULT_BUDGET
) -> ReleaseReport:
    """Verify a release by its own golden samples, and against the base release next to it (../00-base), if there is one.

    Nothing is trained or run in torch, and nothing is timed without a `budget`.

    Raises InputError if `path` is no release, Unsupported for a missing provider.
    """
    manifest, providers = ReleaseManifest.read(path), tuple(providers) or ("cpu",)
    for provider in providers:
        check_provider(provider)
    found = own_contents(path, manifest)
    report = ReleaseReport(
        created=now(),
        environment=environment(providers),
        release=_facts(path, manifest),
        contents=found,
        parity=ParityStages.unmeasured(SKIPPED),
        proof=Proof.unmeasured(SKIPPED),
        latency=Latency.unmeasured(SKIPPED),
    )
    if Verdict.FAIL in (found.manifest.verdict, found.files.verdict):
        return report
    unknown, base = Parity.not_applicable(NO_RUN), _base_of(path)
    export = _export_parity(path, manifest, base, providers)
    report = replace(report, parity=ParityStages(merge=unknown, export=export, total=unknown))
    if Verdict.FAIL in (found.verdict, export.verdict):
        return report
    if base is None:
        reason = NO_BASE if manifest.sequence else IS_BASE
        return replace(report, proof=Proof.not_applicable(reason), latency=Latency.not_applicable(reason))
    return _compare_with_base(report, path, base, providers, budget)


def own_contents(path: Path, manifest: ReleaseManifest) -> Contents:
    """What a release can be asked without its run."""
    tasks = [task.name for task in manifest.tasks]
    identity = check_manifest_and_files(path, manifest, tasks, {})
    if overall(check.verdict for check in identity.values()) is Verdict.FAIL:
        return Contents.only(SKIPPED, **identity)
    return Contents(
        **identity,
        graphs=attempt(lambda: contents.check_programs(path, manifest, GRAPHS), of=len(GRAPHS)),
        tensors=attempt(lambda: contents.check_tensor_map(path, manifest, WEIGHTS), of=len(manifest.tensors)),
        weights=Check.not_applicable(NO_RUN),
        classes=Check.not_applicable(NO_RUN),
        classifier=attempt(lambda: check_classifier(path, tasks, map_tensors(path / WEIGHTS[0])), of=len(tasks)),
        golden=attempt(lambda: check_golden(path, manifest), of=1),
    )


def _facts(path: Path, manifest: ReleaseManifest) -> ReleaseFacts:
    return ReleaseFacts(
        index=manifest.sequence,
        name=manifest.name,
        precision=manifest.precision,
        manifest_sha256=sha256_file(path / MANIFEST),
        base=manifest.base.name,
        base_sha256=manifest.base.sha256,
    )


def _base_of(path: Path) -> Path | None:
    """The base release next to a release; None for the base itself."""
    base = path.parent / "00-base"
    return base if base.is_dir() and base.resolve() != path.resolve() else None


def _export_parity(path: Path, manifest: ReleaseManifest, base: Path | None, providers: Sequence[str]) -> Parity:
    """Golden samples on every provider. A sound base next to the release calibrates the gate."""
    try:
        control = _control(base, manifest, providers) if base else None
        return golden_parity(path, manifest, providers, control)
    except Unsupported:  # says nothing about the release
        raise
    except UNREADABLE as error:
        return Parity.failed(str(error))


def _control(base: Path, manifest: ReleaseManifest, providers: Sequence[str]) -> Parity | None:
    """The golden samples of the base, if it is the one that the release names and all its own checks pass."""
    try:
        own = ReleaseManifest.read(base)
        if (
            own.base != manifest.base
            or own.precision != manifest.precision
            or own_contents(base, own).verdict is not Verdict.PASS
        ):
            return None
        return golden_parity(base, own, providers)
    except UNREADABLE:
        return None


def _compare_with_base(
    report: ReleaseReport, path: Path, base: Path, providers: Sequence[str], budget: TimingBudget | None
) -> ReleaseReport:
    """Proof and latency against the base release."""
    golden = read_tensors(path / "golden.safetensors")
    inputs = parity.Inputs(golden["pixel_values"], golden["input_ids"])
    feeds = graph_feeds(inputs, golden["image_embeds"].shape[1])
    base_graphs, graphs = ({name: folder / name for name in GRAPHS} for folder in (base, path))
    executions = run_graphs(base, feeds, providers)
    control = Check.not_applicable(NO_RUN)
    report = replace(
        report, proof=proof.prove(base_graphs, graphs, executions, lambda: run_graphs(path, feeds, providers), control)
    )
    if report.proof.verdict is Verdict.FAIL or not executions.runs:
        return report
    if budget is None:
        return replace(report, latency=Latency.not_applicable(UNTIMED))
    changed = (
        t for t in parity.TOWERS if sha256_file(path / f"{t}.safetensors") != sha256_file(base / f"{t}.safetensors")
    )
    tower = next(changed, "visual")
    return replace(report, latency=_latency(path, base, tower, feeds[f"{tower}.onnx"], providers, budget))


def _latency(
    path: Path, base: Path, tower: str, feeds: Feeds, providers: Sequence[str], budget: TimingBudget
) -> Latency:
    """Rung L5 on one tower."""
    results, settings = [], Verify()
    for provider in timeable(providers):
        open_base, open_release = (opener(folder / f"{tower}.onnx", dict(feeds), provider) for folder in (base, path))
        contenders = Contenders(PROVIDERS[provider].name, open_base, open_release)
        results.append(latency.added_latency(contenders, settings.pairs, settings.margin, budget))
    return latency.slowest(results, tower)
